"""A job's output as it is passed on."""

from espalier.cluster.connection.job_output import Lines


def test_lines_are_passed_on_once_however_the_log_is_cut_and_sent_again() -> None:
    seen: list[str] = []
    lines = Lines(seen.append)
    for chunk in ("a\nb", "b\nc"):
        lines.feed(chunk)
    lines.restart()  # the connection broke: the log comes from its start, cut elsewhere
    for chunk in ("a\n", "bb\ncc\n", "d"):
        lines.feed(chunk)
    lines.finish("a\nbb\ncc\ndd")
    assert seen == ["a", "bb", "cc", "dd"]
