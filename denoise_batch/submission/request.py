"""What is asked of `submit`, and whether it can be met: everything that is known before a cluster is reached."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch.bundle import DEFAULT_FOLDER, shipped_folder
from denoise_batch.console import PROGRAM
from denoise_batch.errors import FlagError
from denoise_batch.storage import is_uri
from denoise_batch.storage.redaction import has_secrets, redact

if TYPE_CHECKING:
    from denoise_batch.console import ParsedCommand


def check_command(command: ParsedCommand) -> None:
    """Refuses a command that cannot do on a cluster what it would do here.

    Raises:
        FlagError: it is `submit` itself, names a cluster, a relative path or a secret, or would take another model.
    """
    if command.name == "submit":
        raise FlagError("submit cannot be submitted", hint="name the command that the cluster should run")
    if command.address is not None:
        raise FlagError(
            "--address belongs to submit: the job uses the cluster that it runs on",
            hint=f"{PROGRAM} submit --address {redact(command.address)} -- {command.name} …",
        )
    check_paths(command)
    for argument in command.arguments:
        if has_secrets(argument):
            raise FlagError(
                f"{redact(argument)}: its user, password or query would stand in the cluster's list of jobs",
                hint="leave them out, and give the cluster's machines the right to read it (a role, or variables that "
                "the store's client reads)",
            )
    may_name_model = command.name in {"infer", "evaluate"}
    if may_name_model and not command.has("--model") and (DEFAULT_FOLDER.exists() or DEFAULT_FOLDER.is_symlink()):
        raise FlagError(
            f"./{DEFAULT_FOLDER} is the model here, but it is not on the cluster",
            hint="name a folder that the cluster's machines see with --model, or bounds-unet, which ships with us",
        )


def check_paths(command: ParsedCommand) -> None:
    """Refuses paths that mean another place on the cluster than where the command was written.

    Raises:
        FlagError: a path is relative: the job would look for it in a temporary folder of its own, and lose there
            what it writes.
    """
    for path in command.paths:
        # PATH is what `inspect` looks at.
        if path.name in {"--model", "--init", "PATH"} and shipped_folder(Path(path.value)):
            continue
        if is_uri(path.value) or Path(path.value).is_absolute():
            continue
        here = Path(path.value).absolute()
        meant = f": {here}, if the cluster's machines see that" if here.exists() else ""
        raise FlagError(
            f"{path.name} {redact(path.value)} is a relative path: a job would look for it in a temporary folder of "
            "its own",
            hint=f"give an absolute path on a file system that all the cluster's machines share{meant}",
        )


def read_runtime_env(path: Path) -> dict[str, Any]:
    """A runtime environment from a YAML file: packages and variables that the cluster's machines are to have.

    Raises:
        FlagError: it cannot be read, or says where the code comes from, which is ours to say.
    """
    hint = "give a YAML file of a Ray runtime environment, such as jobs/runtime_env.yaml"
    try:
        path.read_text(encoding="utf-8")  # before Ray loads, which takes a while
        from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args

        # Ray's own reader, which is `yaml.safe_load`.
        content = parse_runtime_env_args(runtime_env=str(path))
    except OSError as error:
        raise FlagError(f"--runtime-env {path}: {error.strerror or error}", hint=hint) from error
    except Exception as error:  # whatever its parser raises for what is no YAML
        raise FlagError(f"--runtime-env {path} is no YAML: {' '.join(str(error).split())}", hint=hint) from error
    if not isinstance(content, dict) or not isinstance(content.get("env_vars", {}), dict):
        raise FlagError(f"--runtime-env {path} holds no settings", hint="see jobs/runtime_env.yaml for one")
    ours = sorted({"working_dir", "py_modules"} & content.keys())
    if ours:
        raise FlagError(f"--runtime-env {path} sets {ours[0]}", hint="leave it out: submit sends its own code")
    return content
