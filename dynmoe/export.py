"""`python -m dynmoe.export RUN OUT`: save a trained network as safetensors, with a model card.

    python -m dynmoe.export runs/cl/laptop-dynamicmoe-digits-1f2e3d4c/seed-0 my-network

RUN is a run's folder, or one of its checkpoints. OUT gets model.safetensors, model.json and the
model card README.md. Runs of cl and rl keep their networks; runs of tta and dg need --keep-model.
Two lines of Python load the network, without its training data:

    from dynmoe.export import load
    model = load("my-network")

`--push OWNER/NAME` sends the files to the Hugging Face Hub as well, for the owner alone to see; the
lines are then `from dynmoe.export import load_from_hub; model = load_from_hub("OWNER/NAME")`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dynmoe.commands import begin
from dynmoe.commands import load as load_command
from dynmoe.errors import UserError, unknown
from dynmoe.lab.config import from_dict, identity, run_command
from dynmoe.lab.options import read_options

begin("export", __name__)  # before imports that may fail

import tyro  # noqa: E402
from torch import nn  # noqa: E402

from dynmoe.lab import checkpoint, hub  # noqa: E402
from dynmoe.lab.export import equal_states, read_network, write_network  # noqa: E402
from dynmoe.lab.finished import UNREADABLE  # noqa: E402
from dynmoe.lab.model_card import UNKNOWN, Card, shown_settings  # noqa: E402
from dynmoe.lab.results import RunRow, read_run  # noqa: E402

RUN_COMMANDS = ("cl", "rl", "tta", "dg")
"""Those whose runs have networks."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an export."""

    run: Annotated[str, tyro.conf.Positional] = ""
    """folder of a run, such as runs/cl/NAME/seed-0; a checkpoint in it; or, of rl, its `best`"""
    out: Annotated[str, tyro.conf.Positional] = ""
    """folder for the files; it must be new or hold an earlier export"""
    part: str = ""
    """of dg: the domain that was left out; none: the first one"""
    license: str = UNKNOWN
    """of the weights, such as mit or cc-by-4.0"""
    push: str = ""
    """OWNER/NAME on the Hugging Face Hub to send the files to; needs its token"""
    public: bool = False
    """with --push: all may see a new OWNER/NAME"""
    debug: bool = False
    """show the traceback of an error"""


def load(folder: Path | str) -> nn.Module:
    """The network that was exported into a folder, on the CPU and in evaluation mode.

    Of cl it maps images [B, C, H, W] to logits [B, classes]; of rl observations to the parameters
    of the distribution over actions and values [B]; of dg images to logits. Of tta it is the
    method, which adapts to each batch; its `model` does not. README.md in the folder says how the
    input is made.

    Raises:
        UserError: there is no such network, or its command's packages are not installed.
        ResourceError: its files are damaged.
    """
    about, state = read_network(Path(folder))
    command = _command(str(about["command"]))
    config = from_dict(_settings(command), about["settings"])
    return command.experiment().exporter().network(config, state)


def load_from_hub(name: str, revision: str | None = None, folder: Path | None = None) -> nn.Module:
    """The network OWNER/NAME of the Hugging Face Hub, as `load` gives it.

    Args:
        name: OWNER/NAME.
        revision: a branch, tag or commit; None: the newest.
        folder: where its files are put; None: the cache of huggingface_hub.

    Raises:
        UserError: there is no such network, it may not be read, or a package is not installed.
        ResourceError: the hub cannot be reached, or files are damaged.
    """
    return load(hub.fetch(name, revision, folder))


def export(
    run: Path | str, out: Path | str, part: str = "", licence: str = UNKNOWN, name: str = ""
) -> Path:
    """Write a run's network into a folder, and make sure that it can be made again.

    Args:
        run: the run's folder, one of its checkpoints, or a folder of them, such as `best` of rl;
            of a folder the newest one counts.
        out: see `Config.out`.
        part: of dg, the domain that was left out.
        licence: of the weights.
        name: OWNER/NAME on a hub, for the card; `dynmoe.lab.hub.push` sends the folder.

    Returns:
        The folder.

    Raises:
        UserError: no such run, one that has kept no network, or a folder with other files.
        ResourceError: a checkpoint or file is damaged, or the disk is full.
    """
    run, out = Path(run), Path(out)
    folder = _folder(run)
    row = _row(folder)
    command = _command(row.command)
    experiment, settings = command.experiment(), _settings(command)
    _check_free(out)
    config = from_dict(settings, json.loads((folder / "config.json").read_text()))
    saved = _saved(run, folder)
    shared = experiment.load(config)
    exporter = experiment.exporter()
    part = _part(part, exporter.parts(config, shared))
    state = exporter.state(folder, config, shared, saved and saved["state"], part)
    network = _checked(folder, exporter, config, state)
    summary = folder / "summary.json"
    at_end = row.status == "finished" and run == folder
    card = Card(
        experiment=experiment,
        title=experiment.title(config, shared),
        method=getattr(config, "variant", config.method.part.name),
        settings=shown_settings(_shown(row, identity(config))),
        parameters=sum(p.numel() for p in network.parameters()),
        use=exporter.usage(config, shared, part),
        licence=licence,
        hub=name,
        summary=json.loads(summary.read_text()) if at_end else None,
        step=saved["step"] if saved else 0,
        session=json.loads((folder / "environment.json").read_text())["sessions"][-1],
    )
    about = {"command": row.command, "settings": identity(config), "part": part}
    write_network(out, about, state, card.text())
    return out


def main(argv: list[str]) -> None:
    """Export a run's network, and say how to load it.

    Raises:
        UserError: the run or the folder for the files is not named, or the run cannot be exported
            or sent.
        ResourceError: the hub cannot be reached; the files are written.
    """
    config = read_options(Config, argv, "python -m dynmoe.export", __doc__)
    if not config.run or not config.out:
        raise UserError(
            "name the run's folder and a folder for the files, such as: dynmoe export "
            "runs/cl/NAME/seed-0 my-network"
        )
    if config.push:
        hub.check_push(config.push)
    elif config.public:
        raise UserError("--public has no effect without --push OWNER/NAME; leave it out")
    out = Path(config.out)
    export(Path(config.run), out, config.part, config.license, config.push)
    print(f"exported: {out}; load it with dynmoe.export.load({str(out)!r})")
    if config.license == UNKNOWN:
        print("note: no licence is named; use --license NAME before you share it", file=sys.stderr)
    if config.push:
        address = hub.push(out, config.push, config.public)
        print(f"sent: {address}; load it with dynmoe.export.load_from_hub({config.push!r})")


def _command(name: str) -> Any:
    """The module of a command whose runs have networks."""
    if name not in RUN_COMMANDS:
        raise unknown("command", name, RUN_COMMANDS)
    return load_command(name)


def _settings(command: Any) -> Any:
    """The settings class of a command."""
    return type(next(iter(command.presets().values())))


def _folder(run: Path) -> Path:
    """The run's folder, where a checkpoint in it or a folder of checkpoints may be named."""
    inside = run.parent if run.is_file() else run
    own = (inside / "config.json").is_file() or not (inside.parent / "config.json").is_file()
    return inside if own else inside.parent


def _saved(run: Path, folder: Path) -> dict[str, Any] | None:
    """The checkpoint that is named, else the newest of the folder that is named."""
    if run.is_file():
        return checkpoint.load(run)
    return checkpoint.load_latest(folder / "checkpoints" if run == folder else run)


def _row(folder: Path) -> RunRow:
    """The run in a folder."""
    example = "give a folder such as runs/cl/NAME/seed-0, or a checkpoint in it"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run: it has no config.json; {example}")
    try:
        row = read_run(folder)
    except UNREADABLE as error:
        raise UserError(f"the run in {folder} cannot be read ({error}); {example}") from None
    if row.command not in RUN_COMMANDS:
        raise UserError(
            f"{folder} is in the folder of none of {', '.join(RUN_COMMANDS)}; {example}"
        )
    return row


def _check_free(out: Path) -> None:
    """Refuse a folder with files of something else: README.md would be overwritten."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "model.json").is_file():
        raise UserError(f"{out} holds other files; name a new folder")


def _part(part: str, parts: list[str]) -> str:
    if part and not parts:
        raise UserError("--part has no effect: the run has one network; leave it out")
    if part and part not in parts:
        raise unknown("part", part, parts)
    return part or (parts[0] if parts else "")


def _checked(folder: Path, exporter: Any, config: Any, state: dict[str, Any]) -> nn.Module:
    """The network made again; its weights must be those of the run, bit for bit."""
    try:
        network: nn.Module = exporter.network(config, state)
    except RuntimeError as error:  # torch's, of weights that do not fit
        reason = str(error).strip().split("\n")[-1].strip()
        raise UserError(f"the network of {folder} cannot be made again: {reason}") from None
    made = exporter.weights(network)
    if not equal_states(made, state["weights"]):
        raise UserError(f"the network of {folder} cannot be made again: its weights differ")
    return network


def _shown(row: RunRow, own: dict[str, Any]) -> dict[str, Any]:
    """Flat settings, without those that say where or how a run is kept."""
    return {name: value for name, value in row.settings.items() if name.split(".")[0] in own}


if __name__ == "__main__":
    run_command(main)
