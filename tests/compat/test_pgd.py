"""Released weights of policy-guided diffusion, in and out."""

import pytest
import torch

from polygrad_fast.compat import pgd
from polygrad_fast.denoisers import TemporalUNet
from polygrad_fast.errors import InputError

S, A = 3, 2


def released(num_levels=2, features=24):
    unet = TemporalUNet(S, A, features, num_levels, torch.Generator().manual_seed(0))
    return unet, pgd.export_denoiser(unet.state_dict())


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize("prefix", ["", "params."])
def test_there_and_back(num_levels, prefix):
    unet, arrays = released(num_levels)
    arrays = {prefix + name: array.numpy() for name, array in arrays.items()}
    loaded = pgd.load_denoiser(arrays, S, A)
    assert (loaded.features, loaded.num_levels) == (24, num_levels)
    for name, weight in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert pgd.export_denoiser(loaded.state_dict()).keys() == released(num_levels)[1].keys()


def test_layouts_are_the_released_ones():
    unet, arrays = released()
    assert arrays["Encoder_0.Conv_0.kernel"].shape == (3, S + A + 2, 24)
    assert arrays["Decoder_0.Conv_0.kernel"].shape == (2, 48, 24)
    assert torch.equal(arrays["Encoder_0.Dense_1.kernel"], unet.encoder[1].condition.weight.T)
    assert torch.equal(arrays["Decoder_0.GroupNorm_2.scale"], unet.decoder[0].norm_3.weight)
    kernel = unet.output.weight.permute(2, 1, 0)
    assert torch.equal(arrays["Decoder_0.Conv_3.kernel"], kernel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.pop("Decoder_0.Conv_1.bias"),
            r"Conv_1.bias must be of shape \(24,\), got None",
        ),
        (lambda a: a.update(more=torch.zeros(2)), r"more must be of shape None, got \(2,\)"),
        (
            lambda a: a.update({"Encoder_0.Conv_1.kernel": torch.zeros(3, 24, 25)}),
            r"Encoder_0.Conv_1.kernel must be of shape \(3, 24, 24\), got \(3, 24, 25\)",
        ),
        (lambda a: a.pop("TimeEmbedding_0.Dense_0.kernel"), "with a matrix 'TimeEmbedding_0"),
        (lambda a: a.clear(), r"with a matrix .*, got names \[\]"),
    ],
)
def test_other_weights_are_refused(change, message):
    arrays = dict(released()[1])
    change(arrays)
    with pytest.raises(InputError, match=message):
        pgd.load_denoiser(arrays, S, A)


def test_other_dimensions_and_things_are_refused():
    arrays = released()[1]
    with pytest.raises(InputError, match="for 4 observations and 2 actions: .*Conv_3.bias"):
        pgd.load_denoiser(arrays, S + 1, A)
    with pytest.raises(InputError, match="by name, got list"):
        pgd.load_denoiser([1], S, A)
    with pytest.raises(InputError, match="must be those of a TemporalUNet"):
        pgd.export_denoiser({"weight": torch.zeros(2)})
