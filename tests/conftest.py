import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # tests that need it say so themselves
    pass
else:
    settings.register_profile("dynamon", deadline=None)  # how long an example takes says how busy the machine is
    settings.load_profile("dynamon")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors of these tests are tiny: on a busy machine several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
