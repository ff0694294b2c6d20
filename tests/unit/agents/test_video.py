"""Videos: written, read back by the same library, and compared with what was to be shown."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from agents.actor_critic import ActorCritic
from agents.evaluate import play
from agents.figures import FLOOR_COLORS, expert_color
from agents.statistics import Trace
from agents.video import (
    BACKGROUND,
    CHANGE,
    FLOOR_HEIGHT,
    GAP,
    NOW,
    SHARES_HEIGHT,
    frames,
    write_video,
)
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe.diagnostics import gate_shares
from envs.debug import Stages
from envs.vector import TorchVectorEnv

SCALE = 7
GAME, STRIP = 9 * SCALE, SHARES_HEIGHT + GAP


@pytest.fixture
def trace(corridor: TorchVectorEnv, stroller: ActorCritic) -> Trace:
    """An episode that was played."""
    found = play(corridor, stroller, seed=0, observations=True)[2]
    assert found is not None and len(found.gates) == 2
    assert 0 in found.floors[int(found.floors.argmax()) :]  # down and up again
    return found


def enlarged(env: TorchVectorEnv, trace: Trace, scale: int = SCALE) -> np.ndarray:
    """What the game area is to show, [L, height, width, 3]."""
    assert trace.observations is not None
    images = env.unpack(trace.observations).permute(0, 2, 3, 1).numpy()
    return np.kron(images, np.ones((1, scale, scale, 1), np.uint8))


def read(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        return np.stack(pictures), stream


def test_a_video_shows_the_episode(corridor: TorchVectorEnv, trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "episode.mp4"
    path.write_text("an old one")
    write_video(path, corridor, trace, fps=12, scale=SCALE)
    assert [p.name for p in tmp_path.iterdir()] == ["episode.mp4"]
    pictures, stream = read(path)
    height = GAME + 2 * STRIP + GAP + FLOOR_HEIGHT
    assert pictures.shape == (len(trace.floors), height + height % 2, 15 * SCALE + 1, 3)
    assert stream.average_rate == 12
    assert float(stream.duration * stream.time_base) == pytest.approx(
        len(trace.floors) / 12, abs=1e-3
    )
    game = enlarged(corridor, trace)
    error = np.abs(pictures[:, :GAME, : 15 * SCALE].astype(int) - game)
    assert error.mean() < 4
    # far from the edges of blocks, whose colours are mixed by yuv420p
    centres = error[:, 3 * SCALE // 2 :: 3 * SCALE, 3 * SCALE // 2 : 15 * SCALE : 3 * SCALE]
    assert centres.shape[1:3] == (3, 5) and centres.max() < 16
    exact = np.stack(list(frames(corridor, trace, SCALE)))
    assert np.abs(pictures.astype(int) - exact)[:, GAME:].mean() < 6


def test_every_frame_is_exact_before_compression(corridor: TorchVectorEnv, trace: Trace) -> None:
    shown = np.stack(list(frames(corridor, trace, SCALE)))
    assert np.array_equal(shown[:, :GAME, : 15 * SCALE], enlarged(corridor, trace))
    assert (shown[:, :, -1] == BACKGROUND).all()  # makes the width even


def middle_of(step: int, length: int, width: int) -> int:
    return (2 * step + 1) * width // (2 * length)


def test_strips(corridor: TorchVectorEnv, trace: Trace) -> None:
    """Each strip against the shares and floors, in the middle of each step's columns."""
    length, width = len(trace.floors), 15 * SCALE
    assert length * 4 <= width  # columns enough to look between cursor and marks
    last = list(frames(corridor, trace, SCALE))[-1]
    for number, gates in enumerate(trace.gates.values()):
        strip = last[GAME + GAP + number * STRIP :][:SHARES_HEIGHT]
        shares = gate_shares(gates[:, :2]).numpy()
        for t in range(length - 1):
            column = strip[:, middle_of(t, length, width)]
            for expert in (0, 1):
                color = np.round(255 * np.array(expert_color(expert)))
                part = (column == color).all(axis=1)
                assert abs(part.sum() - shares[t, expert] * SHARES_HEIGHT) <= 1
                # expert 0 lies lowest
                assert part[-1 if expert == 0 else 0] and np.abs(np.diff(part)).sum() == 1
    floor_strip = last[GAME + 2 * STRIP + GAP :][:FLOOR_HEIGHT]
    assert (last[GAME + 2 * STRIP :][:GAP, :-4] == BACKGROUND).all()
    for t in range(length - 1):
        color = bytes.fromhex(FLOOR_COLORS[int(trace.floors[t])][1:])
        assert (floor_strip[:, middle_of(t, length, width)] == list(color)).all()


def test_the_present_and_the_past_are_shown_and_not_what_comes(
    corridor: TorchVectorEnv, trace: Trace
) -> None:
    length, width = len(trace.floors), 15 * SCALE
    changes = [t for t in range(1, length) if trace.floors[t] != trace.floors[t - 1]]
    assert len(changes) > 2
    for step, shown in enumerate(frames(corridor, trace, SCALE)):
        now = (step + 1) * width // length
        strips = shown[GAME + GAP : GAME + 2 * STRIP + GAP + FLOOR_HEIGHT]
        assert (strips[:, now:] == BACKGROUND).all()
        assert (strips[:, now - 2 : now] == NOW).all()
        assert not (strips[:, : now - 2] == NOW).all(axis=(0, 2)).any()  # one cursor
        shares = strips[:SHARES_HEIGHT, : now - 2]
        dark = np.flatnonzero((shares == CHANGE).all(axis=(0, 2)))
        past = [t * width // length for t in changes]
        assert dark.tolist() == [mark for mark in past if mark < now - 2]


def test_more_steps_than_columns(corridor: TorchVectorEnv) -> None:
    """600 steps on 15 columns, each the mean of 40."""
    cells = torch.tensor([0, 1] * 150 + [2, 3] * 150, dtype=torch.uint8)[:, None]
    gates = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).repeat(300, 1)
    long = Trace(0.0, 1, cells[:, 0].long() // 2, {"layer": gates}, cells)
    pictures = list(frames(corridor, long, scale=1))
    assert len(pictures) == 600
    strip = pictures[-1][9 + GAP :][:SHARES_HEIGHT, :15]
    lower = (strip == np.round(255 * np.array(expert_color(0)))).all(axis=2).sum(axis=0)
    assert lower[7] == 0 and (strip[:, 7] == CHANGE).all()
    assert np.delete(lower, [7, 13, 14]).tolist() == [36] * 12  # 3/4 of 48
    assert (strip[:, 13:] == NOW).all()


def test_a_dense_network_has_no_strips(
    corridor: TorchVectorEnv, trace: Trace, tmp_path: Path
) -> None:
    encoder = registry.get("encoder", "mlp").Config(hidden=8)
    policy = ActorCritic(encoder, corridor.input_shape, corridor.num_actions)
    dense = play(corridor, policy, seed=1, observations=True)[2]
    assert dense is not None and dense.gates == {}
    write_video(tmp_path / "dense.mp4", corridor, dense, scale=4)
    pictures, stream = read(tmp_path / "dense.mp4")
    assert pictures.shape == (len(dense.floors), 36, 60, 3) and stream.average_rate == 15
    assert np.abs(pictures.astype(int) - enlarged(corridor, dense, 4)).mean() < 4
    write_video(tmp_path / "large.mp4", corridor, replace(dense, observations=trace.observations))
    assert read(tmp_path / "large.mp4")[0].shape[1:] == (9 * 32, 15 * 32, 3)  # 480 wide


class LastOfFour(TorchVectorEnv):
    """Not stepped: its observations unpack to stacks of four gray frames."""

    def unpack(self, observations: Tensor) -> Tensor:
        return observations


def test_gray_stacks_show_their_last_frame() -> None:
    env = LastOfFour()
    env.device, env.input_shape = torch.device("cpu"), (4, 6, 8)
    seen = torch.randint(0, 256, (3, 4, 6, 8), dtype=torch.uint8)
    pictures = list(frames(env, Trace(0.0, 0, torch.zeros(3).long(), {}, seen), scale=1))
    for picture, stack in zip(pictures, seen, strict=True):
        assert all(np.array_equal(picture[..., c], stack[3]) for c in range(3))


def test_what_cannot_be_shown(
    corridor: TorchVectorEnv, trace: Trace, skilled: ActorCritic, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "x.mp4"
    stages = Stages("Stages-v0", 2)
    vectors = play(stages, skilled, seed=0, observations=True)[2]
    assert vectors is not None
    with pytest.raises(UserError, match=r"needs images, .* vectors of shape \(7,\)"):
        write_video(path, stages, vectors)
    for how, got in (({"fps": 0}, "fps=0, scale=32"), ({"scale": 0}, "fps=15, scale=0")):
        with pytest.raises(UserError, match=f"1 or more, got {got}"):
            write_video(path, corridor, trace, **how)
    with pytest.raises(ValueError, match="observations=True"):
        write_video(path, corridor, replace(trace, observations=None))
    with pytest.raises(UserError, match="there is no folder .*nowhere; make it first"):
        write_video(tmp_path / "nowhere" / "x.mp4", corridor, trace)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="package av; install it with: pip install av"):
        write_video(path, corridor, trace)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_the_old_file(
    corridor: TorchVectorEnv, trace: Trace, tmp_path: Path
) -> None:
    path = tmp_path / "x.mp4"
    path.write_text("the old one")
    assert trace.observations is not None
    broken = trace.observations.clone()
    broken[-1] = 99  # a cell there is not
    long = replace(
        trace, observations=torch.cat([trace.observations] * 9 + [broken]),
        floors=trace.floors.repeat(10), gates={},
    )  # fmt: skip
    with pytest.raises(IndexError):
        write_video(path, corridor, long)
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]
    assert path.read_text() == "the old one"
