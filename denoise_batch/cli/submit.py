"""`submit`: any other command on a Ray cluster, and what becomes of such jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denoise_batch.cli.options import Json, Verbose, example
from denoise_batch.console import parse_command, print_out, print_result, session
from denoise_batch.errors import FlagError
from denoise_batch.progress import Progress
from denoise_batch.storage import local_path

if TYPE_CHECKING:
    from denoise_batch.submission.dashboard import Cluster

app = typer.Typer()


@app.command(
    short_help="Any of these commands on a Ray cluster.",
    epilog=example(
        "denoise-batch submit --address http://localhost:8265 -- infer /shared/in.parquet /shared/out.parquet",
        "denoise-batch submit --address http://localhost:8265 --no-wait -- train --data /shared/clean.parquet "
        "--out /shared/model",
        "denoise-batch submit --address http://localhost:8265 --stop infer-1b9d6bcd4b3f",
    ),
    context_settings={"allow_interspersed_args": False},  # what follows the command's name is the command's
)
def submit(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND ...", help="The command and its arguments, behind `--`.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job to its end, or print its id and leave it alone.")
    ] = True,
    runtime_env: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="YAML",
            help="Ray runtime environment: what to install for this job on machines that lack it.",
        ),
    ] = None,
    follow_id: Annotated[
        str | None, typer.Option("--follow", metavar="ID", help="Follow a job that was submitted before.")
    ] = None,
    status_id: Annotated[str | None, typer.Option("--status", metavar="ID", help="Say how a job stands.")] = None,
    stop_id: Annotated[
        str | None, typer.Option("--stop", metavar="ID", help="Stop a job; what it has done is kept.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a command on a Ray cluster through Ray Jobs, with this very code, and follow it.

    Progress, result, errors and exit code are those of the command; 143 where the job was stopped. Paths are the
    cluster's: absolute, on a file system that all its machines share.
    """
    _one_of(command, follow_id, status_id, stop_id)
    from denoise_batch import cli  # which imports this module
    from denoise_batch.submission import dashboard, jobs, request

    if command is None:
        cluster = dashboard.reach(address)
        if follow_id is not None:
            _follow_job(cluster, follow_id)
            return
        found = jobs.stop(cluster, stop_id) if stop_id is not None else jobs.state(cluster, status_id or "")
        print_result(found.to_json(), [found.line()], as_json=as_json)
        return
    if as_json and wait:
        command = [*command[:1], "--json", *command[1:]]  # behind a `--` of the command's own it would be a path
    parsed = parse_command(cli.app, command)
    request.check_command(parsed)
    environment = request.read_runtime_env(runtime_env) if runtime_env is not None else {}
    cluster = dashboard.reach(address)
    job_id = jobs.new_id(parsed)
    jobs.submit(cluster, parsed, job_id, environment)
    if wait:
        _follow_job(cluster, job_id)
    else:
        print_result({"submission_id": job_id}, [job_id], as_json=as_json)


def _one_of(command: list[str] | None, *ids: str | None) -> None:
    """Refuses a `submit` that asks for nothing, or for several things.

    Raises:
        FlagError: it does.
    """
    if (command is not None) + sum(one is not None for one in ids) != 1:
        raise FlagError(
            "submit takes one of: a command, --follow ID, --status ID, --stop ID",
            hint="denoise-batch submit -- infer /shared/in.parquet /shared/out.parquet",
        )


def _follow_job(cluster: Cluster, job_id: str) -> None:
    """Shows a job's progress, and its result once it has one."""
    from denoise_batch.submission.following import follow

    with Progress() as progress:
        said = follow(cluster, job_id, progress, verbose=session.verbose)
    if said.result:
        print_out("\n".join(said.result))
