"""An episode as an mp4 video: what the agent saw, and beneath it who was in charge.

    game             the frame of this step, enlarged
    one strip per    gate shares up to this step, stacked as in `agents.figures.router_figure`;
    MoE layer        the width is the whole episode, white is now, dark lines where floors change
    floor strip      colour of the floor, darker as it goes down

Shapes: L steps of an episode, B of them at once, M experts, C x H x W one unpacked observation.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agents.figures import FLOOR_COLORS, averaged, expert_color, floor_changes, used_shares
from agents.statistics import Trace
from dynmoe.errors import UserError
from dynmoe.lab.files import write_atomic
from envs.vector import TorchVectorEnv

Pixels = NDArray[np.uint8]
GAME_SIZE, SHARES_HEIGHT, FLOOR_HEIGHT, GAP = 480, 48, 10, 6
"""Pixels: most of the game's longer side by default, heights of the strips, and between them."""
BACKGROUND, NOW, CHANGE = 17, 255, 34
"""Gray levels."""
BATCH = 64
"""Frames unpacked at once."""
QUALITY = {"crf": "18", "preset": "veryfast"}
"""Of x264: hardly to be told from the frames; encoding takes most of the time."""


def check_video_name(path: Path) -> None:
    """Refuse names of other files: a video would overwrite them.

    Raises:
        UserError: it does not end in .mp4.
    """
    if path.suffix.lower() != ".mp4":
        raise UserError(f"--video {path}: the video is an mp4; use a name such as episode.mp4")


def write_video(
    path: Path, env: TorchVectorEnv, trace: Trace, fps: int = 15, scale: int | None = None
) -> None:
    """Write an episode as an h264 video, one frame per step, atomically.

    Args:
        path: the .mp4 file.
        env: unpacks the pictures.
        trace: the episode, with its pictures; without gates the strips are left out.
        fps: steps per second.
        scale: pixels per pixel of the picture; default as many as make it 480 wide or high.

    Raises:
        UserError: pictures are no images, a number is below 1, there is no such folder, or the
            package av is missing.
        ValueError: the trace was made without observations.
    """
    try:
        import av
    except ImportError:
        raise UserError("videos need the package av; install it with: pip install av") from None
    side = max(_size(env, trace))
    scale = max(1, GAME_SIZE // side) if scale is None else scale
    if fps < 1 or scale < 1:
        raise UserError(f"a video needs fps and scale of 1 or more, got fps={fps}, scale={scale}")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(fps), options=QUALITY)
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # threads' slices were seen to differ from run to run
        for number, picture in enumerate(frames(env, trace, scale)):
            if not number:
                stream.height, stream.width = picture.shape[:2]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    write_atomic(path, buffer.getvalue())


def frames(env: TorchVectorEnv, trace: Trace, scale: int) -> Iterator[Pixels]:
    """The pictures of a video, uint8 [height, width, 3], one per step; their sizes are even.

    Raises:
        UserError, ValueError: there are no images, or the trace was made without.
    """
    height, width = (scale * side for side in _size(env, trace))
    assert trace.observations is not None
    strips = _draw_strips(trace, width) if trace.gates else np.zeros((0, width, 3), np.uint8)
    height_all, width_all = (side + side % 2 for side in (height + len(strips), width))
    canvas = np.full((height_all, width_all, 3), BACKGROUND, dtype=np.uint8)
    beneath = canvas[height : height + len(strips), :width]
    length = len(trace.floors)
    for begin in range(0, length, BATCH):
        packed = trace.observations[begin : begin + BATCH].to(env.device)
        for t, game in enumerate(as_pixels(env.images(packed)), start=begin):
            canvas[:height, :width] = game.repeat(scale, axis=0).repeat(scale, axis=1)
            now = (t + 1) * width // length
            beneath[:, :now] = strips[:, :now]
            if len(strips):
                beneath[GAP:, max(0, now - 2) : now] = NOW
            yield canvas.copy()


def _size(env: TorchVectorEnv, trace: Trace) -> tuple[int, int]:
    """Height and width of a trace's images.

    Raises:
        UserError: they are no images.
        ValueError: the trace was made without.
    """
    if trace.observations is None:
        raise ValueError("this trace holds no observations; play with observations=True")
    shape = tuple(env.images(trace.observations[:1].to(env.device)).shape[1:])
    if len(shape) != 3:
        raise UserError(
            f"a video needs images, but this environment shows vectors of shape {shape}"
        )
    return shape[1], shape[2]


def as_pixels(unpacked: Tensor) -> Pixels:
    """Images [B, C, H, W] as [B, H, W, 3]; of a stack of gray ones the last."""
    if unpacked.is_floating_point():
        unpacked = (255 * unpacked.clamp(0, 1)).round().byte()
    last = unpacked if unpacked.shape[1] == 3 else unpacked[:, -1:].expand(-1, 3, -1, -1)
    return last.permute(0, 2, 3, 1).cpu().numpy()


def _draw_strips(trace: Trace, width: int) -> Pixels:
    """The strips of the whole episode, [their height, width, 3]."""
    length = len(trace.floors)
    floors = trace.floors.numpy()[np.arange(width) * length // width]
    shades = np.array([tuple(bytes.fromhex(c[1:])) for c in FLOOR_COLORS], dtype=np.uint8)
    marks = [t * width // length for t in floor_changes(trace.floors.tolist())]
    gap = np.full((GAP, width, 3), BACKGROUND, dtype=np.uint8)
    parts = []
    for gates in trace.gates.values():
        strip = _draw_shares(gates, width)
        strip[:, marks] = CHANGE
        parts += [gap, strip]
    parts += [gap, np.tile(shades[floors % len(shades)], (FLOOR_HEIGHT, 1, 1))]
    return np.concatenate(parts)


def _draw_shares(gates: Tensor, width: int) -> Pixels:
    """Stacked shares of gates [L, M], expert 0 lowest, as [SHARES_HEIGHT, width, 3]."""
    shares = used_shares(gates)
    tops = averaged(np.stack(list(shares.values()), axis=1), width).cumsum(axis=1)
    levels = (np.arange(SHARES_HEIGHT)[::-1] + 0.5) / SHARES_HEIGHT
    above = (levels[:, None, None] > tops[:, :-1]).sum(axis=2)
    colors = np.array([expert_color(e) for e in shares])
    return (255 * colors[above]).round().astype(np.uint8)
