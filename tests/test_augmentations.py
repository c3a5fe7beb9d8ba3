"""Augmentations are what their labels say, the same at any batch split, and absent where the labels are zero."""

import math

import pytest
import torch
from conftest import build, each

from diffx.augmentations import Augmentation, Geometric, NoAugmentation
from diffx.augmentations.geometric import _SYM6, warp
from diffx.cli.budget import set_steps
from diffx.cli.build import build as assemble
from diffx.cli.compose import compose_config
from diffx.experiment import fingerprint, identity
from diffx.utils import DiffxError, Keys

torch.set_num_threads(1)

SIDE = 32
EVERYTHING = {"p": 1.0, "scale": 0.1, "stretch": 0.1, "translation": 0.05}


def keys(n=64, start=0, seed=0):
    return Keys(seed, torch.arange(start, start + n))


def images(n=64, dtype=torch.float32):
    return keys(n).uniform("images", 3, SIDE, SIDE, dtype=dtype) * 2 - 1


@each("augmentation")
def test_every_choice_builds_and_keeps_the_shape(augmentation):
    if augmentation == "none":
        return  # it adds no key: what is built then is tested below
    part = build("augmentation", augmentation)
    assert isinstance(part, Augmentation)
    x, cond = part(images(), keys())
    assert x.shape == (64, 3, SIDE, SIDE) and x.dtype == torch.float32
    assert cond["augment"].shape == (64, part.labels) and cond["augment"].dtype == torch.float32
    assert not [*part.parameters()] and not part.state_dict()


def test_nothing_is_done_at_zero_strength():
    x, cond = Geometric(p=0.0, p_flip=0.0)(images(), keys())
    assert x.equal(images()) and not cond["augment"].any()
    assert NoAugmentation()(images(), keys())[1] == {}


def test_a_label_of_zero_means_untouched_and_any_other_touched():
    before = images(1000)[:, :1, :8, :8]
    x, cond = Geometric(p=0.12)(before, keys(1000))
    zero = (cond["augment"] == 0).all(1)
    # 0.5 not mirrored, 0.94 not upside down, 0.88^4 not moved
    assert zero.float().mean().item() == pytest.approx(0.5 * 0.94 * 0.88**4, abs=0.04)
    same = (x == before).flatten(1).all(1)
    assert torch.equal(same, zero)


def test_flips_are_exact_and_told():
    before = images(400)[:, :1]
    x, cond = Geometric(p=0.0)(before, keys(400))
    flipped = cond["augment"][:, 0] == 1
    assert 150 < flipped.sum() < 250 and not cond["augment"][:, 1:].any()
    assert x[flipped].equal(before[flipped].flip(3)) and x[~flipped].equal(before[~flipped])


def test_the_same_at_any_batch_split():
    part, whole = Geometric(p=0.5), images()
    x, cond = part(whole, keys())
    for size in (1, 7, 32):
        for start in range(0, 64, size):
            stop = min(start + size, 64)
            x_part, cond_part = part(whole[start:stop], keys(stop - start, start))
            assert cond_part["augment"].equal(cond["augment"][start:stop])
            assert x_part.equal(x[start:stop])
    assert not part(whole, keys(seed=1))[1]["augment"].equal(cond["augment"])
    assert not part(whole, keys(start=64))[1]["augment"].equal(cond["augment"])


def test_each_operation_is_chosen_at_its_rate():
    n, p = 20_000, 0.12
    a = Geometric(p=p).draw(keys(n))
    rates = [(a[:, k] != 0).double().mean().item() for k in range(8)]
    # a flip is drawn in half of the cases; so is a direction of stretching
    for rate, expected in zip(rates, [0.5, p / 2, p, p, p / 2, p, p, p], strict=True):
        assert rate == pytest.approx(expected, abs=5 * math.sqrt(expected / n))
    assert torch.equal(a[:, 6] != 0, a[:, 7] != 0)  # one draw for both directions
    for k in (2, 5, 6, 7):
        chosen = a[a[:, k] != 0, k]
        assert chosen.std().item() == pytest.approx(1, abs=0.1) and abs(chosen.mean().item()) < 0.1
    turned = a[a[:, 3] != 0, 3]
    assert -math.pi < turned.min() < -3 and 3 < turned.max() < math.pi


# ---- what is done, computed by other means ----


def picture(right, down):
    """A smooth function of the position in pixels from the centre."""
    slow = 2 * math.pi / SIDE
    return torch.sin(slow * (right + 0.3 * down) + 0.4) + 0.5 * torch.cos(slow * (1.3 * down - 0.5 * right))


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def transform(label, sign, part):
    """The 3×3 matrix from a position before to the one after, of what the nine labels say (Table 6 of the paper).

    A stretch and a squeeze across it have the same labels: `sign` chooses.
    """

    def turn(cos, sin):
        return matrix([cos, -sin, 0], [sin, cos, 0], [0, 0, 1])

    flip_x, flip_y, scale, cos_1, sin, along, across, shift_x, shift_y = label.double().tolist()
    flips = matrix([1 - 2 * flip_x, 0, 0], [0, 1 - 2 * flip_y, 0], [0, 0, 1])
    factor = 2 ** (part.scale * scale)
    size = math.hypot(along, across)
    direction = turn(along / size, across / size) if size else torch.eye(3, dtype=torch.float64)
    s = 2 ** (part.stretch * size * sign)
    stretch = direction.T @ torch.diag(matrix(s, 1 / s, 1)) @ direction
    shift = matrix([1, 0, part.translation * SIDE * shift_x], [0, 1, part.translation * SIDE * shift_y], [0, 0, 1])
    turned = turn(cos_1 + 1, sin).T
    return shift @ stretch @ turned @ torch.diag(matrix(factor, factor, 1)) @ flips


def test_labels_describe_exactly_what_was_done():
    part = Geometric(**EVERYTHING)
    axis = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    n = 60
    x, cond = part(picture(right, down).expand(n, 1, SIDE, SIDE).clone(), keys(n))
    places = torch.stack([right, down, torch.ones_like(down)]).flatten(1)
    compared = 0
    for image, label in zip(x[:, 0], cond["augment"], strict=True):
        errors = []
        for sign in (1, -1):
            origin = (torch.linalg.inv(transform(label, sign, part)) @ places).unflatten(1, (SIDE, SIDE))
            # what lies within the image before, a filter's width from its border
            inside = (origin[:2].abs() < (SIDE - 1) / 2 - 3).all(0)
            errors.append((image - picture(origin[0], origin[1]))[inside].abs().max().item())
            compared += int(inside.sum())
        # the filter's centre is a tenth of a pixel off; a whole pixel would be an error of 0.25
        assert min(errors) < 0.05
    assert compared > n * SIDE**2 / 2
    assert len(cond["augment"].unique(dim=0)) == n


def test_each_label_alone_has_its_direction():
    part = Geometric(p=0.0)
    spot = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)
    spot[..., 14:18, 22:26] = 1.0  # right of the centre
    axis = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2

    def centre(k, value):
        a = torch.zeros(1, 8, dtype=torch.float64)
        a[0, k] = value
        moved = warp(spot, part.origins(a, SIDE, SIDE), part.filter)[0, 0]
        return [(moved.sum(d) * axis).sum().item() / moved.sum().item() for d in (0, 1)]

    # the filter's centre is a tenth of a pixel off
    assert centre(2, 0.0) == pytest.approx([8, 0], abs=1e-6)
    assert centre(2, 1.0) == pytest.approx([8 * 2**0.2, 0], abs=0.15)  # larger
    assert centre(3, math.pi / 2) == pytest.approx([0, -8], abs=0.15)  # a quarter turn, upwards
    assert centre(5, -1.0) == pytest.approx([8 * 2**-0.2, 0], abs=0.15)  # squeezed along the first axis
    assert centre(6, -1.0) == pytest.approx([8 - SIDE / 8, 0], abs=0.15)  # to the left
    assert centre(7, 1.0) == pytest.approx([8, SIDE / 8], abs=0.15)  # down


def test_a_shift_by_whole_pixels_is_exact_and_the_rest_mirrored():
    part, x = Geometric(), images(1, torch.float64)
    a = torch.zeros(1, 8, dtype=torch.float64)
    a[0, 6] = 3 / (SIDE * part.translation)
    moved = warp(x, part.origins(a, SIDE, SIDE), part.filter.double())
    expected = torch.cat([x[..., 1:4].flip(3), x[..., :-3]], dim=3)
    # the published filter has 15 digits, the buffer 7
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_the_filter_is_the_wavelet():
    # what defines the orthonormal wavelets of 6 vanishing moments; of 12 taps this is the least asymmetric
    h = torch.tensor(_SYM6, dtype=torch.float64)
    assert h.sum().item() == pytest.approx(math.sqrt(2), abs=1e-12)
    for shift in range(6):
        assert (h[2 * shift :] * h[: 12 - 2 * shift]).sum().item() == pytest.approx(float(shift == 0), abs=1e-9)
    k = torch.arange(12, dtype=torch.float64)
    for moment in range(6):
        assert ((-1) ** k * (k - 5.5) ** moment * h).sum().item() == pytest.approx(0, abs=1e-6)


def test_rotation_does_not_alias():
    # the finest checkerboard, turned by 45°, would be a coarse pattern if it were interpolated from pixel to pixel
    part = Geometric()
    board = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1.0
    a = torch.zeros(1, 8, dtype=torch.float64)
    a[0, 3] = math.pi / 4
    moved = warp(board, part.origins(a, SIDE, SIDE), part.filter.double())
    left = moved.square().mean().item()
    # bilinear interpolation at the output's own pixels alone
    grid = torch.nn.functional.affine_grid(part.origins(a, SIDE, SIDE), [1, 1, SIDE, SIDE], align_corners=False)
    naive = torch.nn.functional.grid_sample(board, grid, padding_mode="reflection", align_corners=False)
    assert left < 0.03 < 0.1 < naive.square().mean()


# ---- in training ----

EDM = ["data=digits", "augmentation=edm", "trainer=cpu", "extractor=none", "training.max_steps=2", "data.batch_size=8"]
NETWORK = ["backbone=ddpmpp_cifar10", "backbone.base=8", "backbone.mult=[1]", "backbone.blocks=1"]
NETWORK += ["backbone.attention=[]", "backbone.augment_labels=9"]


def composed(*words):
    return compose_config("train", list(words), [], set_steps)


def step(arm, index):
    x = (Keys(0, index).uniform("x", 1, 8, 8) * 256).to(torch.uint8)
    return arm.module.training_step({"x": x, "label": index % 10, "index": index}, 0)


def test_training_tells_the_network_and_is_the_same_at_any_batch_split():
    arm = assemble(composed(*EDM, *NETWORK))
    for p in arm.module.denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    given = []
    arm.module.denoiser.backbone.register_forward_pre_hook(lambda m, a, kw: given.append(kw), with_kwargs=True)
    arm.module.eval()
    whole = step(arm, torch.arange(8))["losses"]
    assert given[0]["augment"].shape == (8, 9) and given[0]["augment"].any()
    parts = torch.cat([step(arm, torch.arange(k, k + 2))["losses"] for k in range(0, 8, 2)])
    torch.testing.assert_close(parts, whole)
    assert torch.cat([g["augment"] for g in given[1:]]).equal(given[0]["augment"])
    # sampling tells it nothing
    given.clear()
    arm.generator(arm.module.denoiser)(torch.arange(2))
    assert given and all("augment" not in g for g in given)


def test_no_augmentation_leaves_config_identity_and_loss_as_they_were():
    words = ["data=digits", "trainer=cpu", "extractor=none", "training.max_steps=2"]
    config = composed(*words)
    assert "augmentation" not in config
    assert config == composed(*words, "augmentation=none")
    arm = assemble(config)
    assert isinstance(arm.module.augmentation, NoAugmentation)
    assert not [key for key in arm.module.state_dict() if "augment" in key]
    other = composed(*EDM, *NETWORK)
    without = {key: value for key, value in other.items() if key != "augmentation"}
    assert fingerprint(identity(other)) != fingerprint(identity(without))  # it is part of what the experiment is


def test_mistakes_are_named():
    with pytest.raises(DiffxError, match=r"backbone\.augment_labels=9"):
        assemble(composed(*EDM))
    with pytest.raises(DiffxError, match=r"the network is told 3"):
        assemble(composed(*EDM, *NETWORK, "backbone.augment_labels=3"))
    with pytest.raises(DiffxError, match=r"augmentation.p is 1.5"):
        Geometric(p=1.5)
    with pytest.raises(DiffxError, match="set augmentation=none"):
        Geometric()(torch.zeros(2, 3), keys(2))
    with pytest.raises(DiffxError, match="set augmentation=none"):
        Geometric()(torch.zeros(2, 3, 2, 2), keys(2))
