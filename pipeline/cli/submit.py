"""`espalier submit`: a command as a job on a Ray cluster, and how a job is looked at, followed and stopped."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from espalier.pipeline.cli.flags import Json, show
from espalier.stages.errors import Refusal

Address = Annotated[
    str | None, typer.Option(help="Cluster (host:port) or its dashboard (http://...).", metavar="WHERE")
]
JobId = Annotated[str, typer.Argument(help="As `submit` said it.", metavar="ID", show_default=False)]


class Submitting(TyperGroup):
    """A group whose first word is one of its commands, about a job that there is, or else begins the command that
    becomes a job. Of such a command the options of `submit` may also stand within, up to `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, words, _ = self.make_parser(ctx).parse_args(args=list(args))
        ctx.allow_interspersed_args = not words or words[0] not in self.commands
        super().parse_args(ctx, args)
        if ctx.allow_interspersed_args:
            ctx.args, ctx._protected_args = [*ctx._protected_args, *ctx.args], []
        return list(ctx.args)


app = typer.Typer(
    cls=Submitting,
    invoke_without_command=True,
    subcommand_metavar="[--] COMMAND ... | status [ID] | logs ID | stop ID",
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


@app.callback()
def submit(
    context: typer.Context,
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", metavar="", help="Say which job it is, and leave it.")] = False,
    follow: Annotated[bool, typer.Option(hidden=True)] = True,  # --no-follow, as --detach was called
    working_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A folder that goes along; the job works in its copy. Models stay where they are."
        ),
    ] = None,
    runtime_env: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML or JSON: fields of Ray's runtime_env, such as pip, env_vars."),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option("--entrypoint-cpus", metavar="X", help="For the command's own process.")
    ] = None,
    gpus: Annotated[float | None, typer.Option("--entrypoint-gpus", metavar="X", help="The same.")] = None,
    memory: Annotated[str | None, typer.Option("--entrypoint-memory", metavar="SIZE", help="The same.")] = None,
) -> None:
    """Run an espalier command as a job on a Ray cluster; its output and exit code come back.

    Ctrl-C leaves the job to itself: `logs -f` follows it again, `stop` ends it.

    Example: espalier submit --address head:6379 -- prune /data/llama --output /data/out --calibration /data/text.txt
    """
    asked_for = (working_dir, runtime_env, cpus, gpus, memory)
    if context.invoked_subcommand is not None:
        if detach or not follow or any(value is not None for value in asked_for):
            raise Refusal(f"submit {context.invoked_subcommand}: takes no options of a new job before it but --address")
        return
    if not context.args:
        raise Refusal("submit: nothing to run; write `espalier submit -- prune ...`")
    from espalier.pipeline.commands.submit import job_needs, submit_command

    code = submit_command(context.args, address=address, follow=follow and not detach, needs=job_needs(*asked_for))
    raise typer.Exit(code)


@app.command()
def status(
    context: typer.Context,
    job_id: Annotated[str | None, typer.Argument(help="As `submit` said it.", metavar="ID", show_default=False)] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """How a job is doing; without an ID, all jobs of the cluster.

    Example: espalier submit status raysubmit_4LamXRuQpYdSMg7J --address head:6379
    """
    from espalier.cluster.connection.jobs import state, states
    from espalier.pipeline.cli.tables import job_table

    jobs = [state(job_id, _where(context, address))] if job_id else states(_where(context, address))
    result = asdict(jobs[0]) if job_id else {"jobs": [asdict(job) for job in jobs]}
    show(result, as_json, lambda: job_table(jobs))


@app.command()
def logs(
    context: typer.Context,
    job_id: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", metavar="", help="To the job's end; then with its exit code.")
    ] = False,
    address: Address = None,
) -> None:
    """A job's output so far, or with -f as it comes.

    Example: espalier submit logs -f raysubmit_4LamXRuQpYdSMg7J --address head:6379
    """
    from espalier.cluster.connection.jobs import logs

    outcome = logs(job_id, _where(context, address), follow=follow, on_line=typer.echo)
    raise typer.Exit(outcome.exit_code or 0)


@app.command()
def stop(context: typer.Context, job_id: JobId, address: Address = None, as_json: Json = False) -> None:
    """Stop a job as Ctrl-C stops a command: a run says how to go on, and can be resumed.

    Example: espalier submit stop raysubmit_4LamXRuQpYdSMg7J --address head:6379
    """
    from espalier.cluster.connection.jobs import stop

    job = stop(job_id, _where(context, address))
    show(asdict(job), as_json, lambda: f"job {job.id}: {job.status}")


def _where(context: typer.Context, address: str | None) -> str | None:
    """--address, which may stand before `status` too."""
    before: str | None = context.parent.params["address"] if context.parent else None
    return address or before
