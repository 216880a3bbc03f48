"""What is taken out of a URI or a message, and what stays."""

import pytest

from espalier.cluster.connection.redact import is_secret, storable, without_credentials, without_secrets


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://ann:pass-word@host:5000/ml", "http://host:5000/ml"),
        ("https://token-alone@host", "https://host"),
        ("https://ann:p%40ss@host/a@b?x=c@d", "https://host/a@b?x=c@d"),
        ("postgresql://ann:p/a:s?s@db.example:5432/mlflow", "postgresql://db.example:5432/mlflow"),
        ("postgresql+psycopg2://ann:p@db/mlflow?sslmode=require", "postgresql+psycopg2://db/mlflow?sslmode=require"),
        ("mysql+pymysql://ann@db/mlflow?ssl_key=abc&charset=utf8", "mysql+pymysql://db/mlflow?ssl_key=***&charset=utf8"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3Dabc", "mssql+pyodbc:///?odbc_connect=***"),
        ("s3://AKIA:secret@bucket/key", "s3://bucket/key"),
        ("https://s3.host/x?X-Amz-Signature=abc&part=1", "https://s3.host/x?X-Amz-Signature=***&part=1"),
        ("HTTP://ann:p@HOST/", "HTTP://HOST/"),
        ("neither 'https://ann:p@host/x' nor mysql://u:p@h/d", "neither 'https://host/x' nor mysql://h/d"),
    ],
)  # fmt: skip
def test_credentials_leave_a_uri_and_nothing_else_does(given: str, shown: str) -> None:
    assert without_credentials(given) == shown
    assert without_credentials(shown) == shown


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000/path@2/x?at=a@b",
        "sqlite:////home/ann@site/mlflow.db",
        "sqlite:///file:/home/a%3Fb/mlflow.db?uri=true",
        "redis://host:6379/0@x",
        "owner/name:config:split",
        "ann@example.org wrote to host:6379",
        "file:///tmp/a#b",
        "",
    ],
)
def test_what_holds_no_credentials_stays(uri: str) -> None:
    assert without_credentials(uri) == uri


def test_a_message_loses_the_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_value\n")
    monkeypatch.setenv("SHORT_TOKEN", "1")
    message = "Illegal header value b'Bearer hf_planted_value' after 1 attempt; Authorization: Basic YW5uOnBhc3M="
    assert without_secrets(message) == "Illegal header value b'Bearer ***' after 1 attempt; Authorization: Basic ***"


def test_values_within_values_are_looked_at() -> None:
    given = {"a": ["http://u:p@h", {"b": ("mysql://u:p@h/d", 1.5, None)}], "c": True}
    assert storable(given) == {"a": ["http://h", {"b": ["mysql://h/d", 1.5, None]}], "c": True}


def test_names_tell_secrets() -> None:
    secret = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID")
    plain = ("HF_TOKEN_PATH", "RAY_AUTH_MODE", "TOKENIZERS_PARALLELISM", "MLFLOW_TRACKING_URI", "HF_HOME", "MONKEY")
    assert all(map(is_secret, secret)) and not any(map(is_secret, plain))
