"""HyperMoE: beside the chosen experts, one that is generated from those that were not chosen.

Shapes: N rows that are routed, M most experts, C width of the codes, H hidden units of the
generated expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_linear, draw_uniform, seeded_linear
from dynmoe.moe.multi_head import MakeLayer
from dynmoe.moe.padding import Padding
from dynmoe.moe.router import Routing


class HyperMoE(nn.Module):
    """A sparse MoE layer and a hypernetwork, `y = layer(x) + gamma W_up(z) relu(W_down(z) x)`.

    Zhao et al. 2024 (arXiv 2402.12656), HyperMoE; the second term is that of Zhang et al. 2025
    (arXiv 2507.11181), Eq. 12. Every expert has a code of its own; `z = silu(A m + a)` encodes the
    mean m of the codes of the experts that a row does not use. `W_down(z)` [H, D_in] and `W_up(z)`
    [D_out, H] are linear in z, so each row has an expert of its own, made from those that stay
    idle, while none of these runs. Ours: the plain mean and SiLU; W_up starts at 0, so that the
    layer starts as it was; one hypernetwork a layer, where the paper can share one among layers.

    Growth (`GrowthController` on a model that holds this) needs no more than the layer's own: codes
    for all M experts are there from the start, and a code counts once its expert exists. Where a
    row uses every expert, as with one expert alone, nothing is generated. As a new expert moves the
    means, no init preserves the function once the hypernetwork has learnt. `dynmoe.moe.prune` takes
    the layer inside; put a new hypernetwork around what it returns.

    Args:
        dim_in: input width, D_in.
        dim_out: output width, D_out.
        make_layer: makes the layer, called once with (D_in, D_out): one with a sparse router, and
            a bank of rows [N, D].
        code_dim: C.
        hidden: H.
        gamma: weight of the generated expert.
        generator: draws the weights; None: torch's global one.

    Attributes:
        codes: Parameter [M, C]. encoder: A and a.
        down: Parameter [C, H, D_in]. up: Parameter [C, D_out, H].

    Raises:
        UserError: a width below 1, a bank of whole samples; in use, a router that is not sparse.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        make_layer: MakeLayer,
        code_dim: int = 16,
        hidden: int = 8,
        gamma: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if code_dim < 1 or hidden < 1:
            raise UserError(f"HyperMoE: code_dim={code_dim} and hidden={hidden} must be at least 1")
        layer = make_layer(dim_in, dim_out)
        if layer.bank.per_sample:
            raise UserError(
                f"HyperMoE: bank {layer.bank.name} takes whole samples, and experts are generated "
                "for single rows; use a bank such as pool"
            )
        self.layer, self.gamma = layer, gamma
        self.codes = nn.Parameter(torch.empty(layer.max_experts, code_dim))
        self.encoder = seeded_linear(code_dim, code_dim, generator)
        self.down = nn.Parameter(torch.empty(code_dim, hidden, dim_in))
        self.up = nn.Parameter(torch.zeros(code_dim, dim_out, hidden))
        self._draw(generator)

    def _draw(self, generator: torch.Generator | None) -> None:
        """Codes of scale 1; W_down uniform in +-1/sqrt(D_in)."""
        draw_uniform(self.codes, 3**0.5, generator)
        draw_uniform(self.down, self.down.shape[2] ** -0.5, generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, as `MoELayer.reset_parameters`."""
        self.layer.reset_parameters(generator)
        self.reset_hypernetwork(generator)

    @torch.no_grad()
    def reset_hypernetwork(self, generator: torch.Generator | None = None) -> None:
        """Back to the start with everything but the layer, which may have grown."""
        draw_linear(self.encoder, generator)
        self.up.zero_()
        self._draw(generator)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        routing_input: Tensor | None = None,
    ) -> Tensor:
        """[..., D_in] -> [..., D_out]; the other arguments are those of the layer.

        Raises:
            UserError: the router is not sparse: every expert is used, and none is left to learn
                from.
        """
        y = self.layer(x, mask, context, routing_input)
        routing = self.layer.last_routing
        if routing is None or routing.chosen is None:
            raise UserError(
                f"HyperMoE: router {self.layer.router.name} uses every expert for every row; take "
                "a sparse one such as topk"
            )
        mask = self.layer.routing_context[0] if mask is None else mask
        if mask is not None:
            by_sample = self.layer.route_per == "sample" or routing_input is not None
            x = Padding.of(mask, x, -1, by_sample).blank(x)
        rows = x.reshape(-1, x.shape[-1])
        z = self._encode(routing)
        z = z.repeat_interleave(len(rows) // max(len(z), 1), dim=0)  # samples have equal rows
        extra = _generated(torch.relu(_generated(rows, z, self.down)), z, self.up)
        return y + self.gamma * extra.view(y.shape)

    def _encode(self, routing: Routing) -> Tensor:
        """z [N, C] of the experts that exist and that a row does not use; 0 where there are none.

        z multiplies all that is generated: where it is 0 there is no expert.
        """
        assert routing.chosen is not None
        idle = (routing.active & ~routing.chosen).to(self.codes.dtype)
        count = idle.sum(dim=1, keepdim=True)
        codes = torch.where(routing.active.unsqueeze(1), self.codes, 0.0)
        z = F.silu(self.encoder(idle @ codes / count.clamp(min=1)))
        return torch.where(count > 0, z, 0.0)


def _generated(x: Tensor, z: Tensor, maps: Tensor) -> Tensor:
    """[N, out] `sum_c z_c maps_c x` for x [N, in], z [N, C] and maps [C, out, in].

    The C products come before the sum, so that no row's own matrix is ever made.
    """
    by_code = (x @ maps.flatten(0, 1).T).unflatten(1, (len(maps), -1))  # [N, C, out]
    return (z.unsqueeze(1) @ by_code).squeeze(1)
