import pytest
import torch

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.bridge.order import MAR_ORDER, dimension_order, inverse, low_frequency_share


def low_passed(cutoffs, images=64, side=16):
    """Channel c: white noise without frequencies above cutoffs[c], at unit variance or so."""
    noise = torch.randn(images, side, side, len(cutoffs), generator=torch.Generator().manual_seed(0))
    frequency = torch.fft.fftfreq(side).abs()
    highest = torch.maximum(frequency[:, None], frequency)[..., None]
    kept = torch.fft.fft2(noise, dim=(1, 2)) * (highest <= torch.tensor(cutoffs))
    return torch.fft.ifft2(kept, dim=(1, 2)).real


def test_recovers_a_known_order():
    cutoffs = [0.5, 0.3125, 0.4375, 0.25, 0.375]
    order = dimension_order(low_passed(cutoffs))
    assert order.tolist() == sorted(range(5), key=lambda c: cutoffs[c])


def test_shares():
    share = low_frequency_share(low_passed([0.1, 0.5]))
    assert float(share[0]) == pytest.approx(1)
    # White noise has energy in proportion to the number of frequencies: 9 x 9 of 16 x 16 are up to 0.25.
    assert float(share[1]) == pytest.approx(81 / 256, abs=0.01)


def test_a_constant_is_low_and_size_does_not_matter():
    x = low_passed([0.5, 0.5])
    assert torch.allclose(low_frequency_share(x), low_frequency_share(x * torch.tensor([1.0, 1e4])))
    assert float(low_frequency_share(torch.ones(2, 4, 4, 1))[0]) == 1


def test_a_channel_of_zeros_comes_last():
    x = low_passed([0.5, 0.5])
    x[..., 0] = 0
    assert dimension_order(x).tolist() == [1, 0]


def test_inverse_undoes_the_published_order():
    order = torch.tensor(MAR_ORDER)
    values = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(values[:, order][:, inverse(order)], values)
    assert sorted(MAR_ORDER) == list(range(16))
    assert MAR_ORDER[:4] == (8, 1, 10, 9)


def test_messages():
    with pytest.raises(MmpostError) as error:
        inverse(torch.tensor([0, 2, 2]))
    assert str(error.value) == (
        "bridge: the channel order [0, 2, 2] is not a permutation of 0..2. "
        "Take the order that dimension_order returns. [MMP-C094]"
    )
    with pytest.raises(MmpostError, match="MMP-C093"):
        dimension_order(torch.zeros(4, 4, 2))
    with pytest.raises(MmpostError, match="MMP-C093"):
        dimension_order(torch.zeros(1, 4, 4, 2), cutoff=0.6)
