"""What TensorBoard shows of runs of `tta` and `dg`, see `dynmoe.lab.board`."""

from __future__ import annotations

from dynmoe.lab.board import Board

TTA = Board(
    {
        "1 accuracy": {
            "of all images so far": "accuracy/so far",
            "of the latest window": "accuracy/window",
            "clean images, held out": "accuracy/clean, held out",
        },
        "2 experts": {
            "gates, balance": "routing/balance",
            "gates, entropy": "routing/router_entropy",
            "likeness": "experts/similarity",
            "load, largest": "routing/largest_share",
            "used experts": "routing/used_experts",
        },
        "3 adaptation": {
            "skipped updates": "adapter/skipped",
            "agreement of the loss with the labels": "gates/alignment",
        },
    }
)
"""Steps are batches of the stream."""

DG = Board(
    {
        "1 test accuracy": {r"on \1": "([^/]*)/test"},
        "2 growth": {
            r"change of the output, \1": "(.*)/growth/output_change",
            r"loss after, \1": "(.*)/growth/loss_after",
            r"loss before, \1": "(.*)/growth/loss_before",
        },
        "3 validation accuracy": {r"without \1": "([^/]*)/validation"},
        "4 loss": {r"without \1": "([^/]*)/loss"},
    }
)
"""A chart of each group per domain that was left out; trainings that only select have none."""
