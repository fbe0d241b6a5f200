"""What is known to go wrong on GPUs and not on CPUs: one check each."""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamon.callbacks import DynamicsMonitor, SharpnessMonitor, WeightMonitor
from dynamon.curvature import HessianOperator, critical_sharpness, top_eigenvalues
from dynamon.kernels import gram_iteration
from dynamon.layers import describe_layers
from dynamon.optim import LayerwiseRates
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.rates import NoiseAdaptiveRates
from tests.gpu.report import Report, Skip, check
from tests.gpu.subjects import DEVICE, ON_GPU, SERIES, STEPS, TEXT, Recurrent, differing, fit, gpt, loss_of, state


class FusedLoss(torch.autograd.Function):
    """Head and cross-entropy in one, gradients taken in the forward pass: as Liger and others do it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in (hidden, head)]
            loss = F.cross_entropy((own[0] @ own[1].t()).float(), labels)
            ctx.save_for_backward(*torch.autograd.grad(loss, own))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        hidden, head = ctx.saved_tensors
        return hidden * outer, head * outer, None


class Small:
    """A perceptron, its head apart, and a batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()).to(DEVICE)
        self.head = nn.Parameter(0.2 * torch.randn(10, 32).to(DEVICE))
        self.x, self.y = torch.randn(256, 8).to(DEVICE), torch.randint(10, (256,)).to(DEVICE)
        self.parameters = {**dict(self.body.named_parameters()), "head": self.head}

    def loss(self) -> Tensor:
        return F.cross_entropy((self.body(self.x) @ self.head.t()).float(), self.y)

    def fused(self) -> Tensor:
        return FusedLoss.apply(self.body(self.x), self.head, self.y)


def autocast(dtype: torch.dtype | None, cached: bool = False) -> Any:
    """Autocast as Lightning has it, or none."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(DEVICE, dtype, cache_enabled=cached)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Float32 products in TF32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@check("hazards", 3.0, rank=1)
def cudnn_recurrent_layers_have_a_second_derivative(report: Report) -> None:
    """Else eigenvalues of LSTMs are taken from differences in TF32."""
    network = Recurrent(dropout=0.0).to(DEVICE)
    batch = [t[:64].to(DEVICE) for t in SERIES.tensors]
    operator = HessianOperator(lambda: loss_of(network, batch), dict(network.named_parameters()))
    found = top_eigenvalues(operator)
    report.note("backend", operator.backend)
    report.note("error of a product", found.product_error)
    report.hold("by double backward", operator.backend == "double_backward")
    report.hold("converged", found.converged)


@check("hazards", 20.0, rank=14)
def training_keeps_its_compiled_graph(report: Report) -> None:
    """As many graphs with a monitor as without."""
    from torch._dynamo.utils import counters

    graphs = {}
    for name, callbacks in {"plain": [], "monitored": [DynamicsMonitor(budget=None, every_n_steps=2)]}.items():
        torch._dynamo.reset()
        counters.clear()
        how = {} if ON_GPU else {"backend": "eager"}
        fit(lambda how=how: torch.compile(gpt(), **how), TEXT, callbacks, precision="bf16-mixed", optimizer="fused")
        graphs[name] = counters["stats"]["unique_graphs"]
        report.note(f"graphs, {name}", graphs[name])
    report.hold("as many", graphs["plain"] == graphs["monitored"])


@check("hazards", 25.0, rank=15)
def reduce_overhead(report: Report) -> None:
    """Plain training first: what raises there is not ours. Then without inductor's static launcher."""
    if not ON_GPU:
        raise Skip("CUDA graphs need a GPU")

    def train(*callbacks: Any) -> dict[str, Tensor]:
        torch._dynamo.reset()
        network = lambda: torch.compile(gpt(), mode="reduce-overhead")  # noqa: E731
        return state(*fit(network, TEXT, callbacks, precision="bf16-mixed", optimizer="fused", deterministic="warn"))

    try:
        plain, again = train(), train()
    except RuntimeError as error:
        report.note("plain training raises", str(error)[:200])
        for option in ("use_static_cuda_launcher", "use_static_triton_launcher"):
            with contextlib.suppress(Exception):
                setattr(torch._inductor.config, option, False)
        try:
            plain, again = train(), train()
        except RuntimeError as second:
            raise Skip(f"plain training raises with either launcher: {str(second)[:200]}") from second
        report.note("plain training without the static launcher", "runs")
    monitor = DynamicsMonitor(budget=None, every_n_steps=2)
    seen = train(monitor)
    report.note("plain runs are equal", not differing(plain, again))
    report.note("what differs", sorted(differing(plain, seen))[:4])
    report.hold("no measurement failed", monitor.failures == 0)
    report.hold("bitwise equal, where plain runs are", bool(differing(plain, again)) or not differing(plain, seen))


@check("hazards", 2.0, rank=2)
def custom_functions_in_half_precision(report: Report) -> None:
    """Whose backward pass drops terms of the Hessian: right, or marked as not converged."""
    small = Small()
    for dtype in (None, torch.bfloat16):
        with autocast(dtype):
            true = top_eigenvalues(HessianOperator(small.loss, small.parameters))
            found = top_eigenvalues(HessianOperator(small.fused, small.parameters))
        pair = [float(true.values[0]), float(found.values[0]), found.backend, found.converged]
        report.note(f"true and found, {dtype}", pair)
        report.hold(f"right or marked, {dtype}", abs(pair[1] / pair[0] - 1) < 0.05 or not found.converged)


@check("hazards", 3.0, rank=3)
def half_precision_keeps_small_gradients(report: Report) -> None:
    """A large vocabulary under fp16, whose gradients begin below its smallest number."""
    tokens, count = (50257, 2048) if ON_GPU else (1000, 64)
    torch.manual_seed(0)
    body = [nn.Embedding(512, 64), nn.Linear(64, 64), nn.Tanh()]
    network = nn.Sequential(*body, nn.Linear(64, tokens, bias=False)).to(DEVICE)
    nn.init.normal_(network[3].weight, std=0.02)
    x, y = torch.randint(512, (count,), device=DEVICE), torch.randint(tokens, (count,), device=DEVICE)
    values = {}
    for dtype in (None, torch.bfloat16, torch.float16):
        with autocast(dtype):
            parameters = dict(network.named_parameters())
            operator = HessianOperator(lambda: F.cross_entropy(network(x).float(), y), parameters)
            values[dtype] = float(top_eigenvalues(operator).values[0])
        report.note(f"top eigenvalue, {dtype}", values[dtype])
    report.hold("fp16 within 5 %", abs(values[torch.float16] / values[None] - 1) < 0.05)
    report.hold("bf16 within 5 %", abs(values[torch.bfloat16] / values[None] - 1) < 0.05)


@check("hazards", 5.0, rank=8)
def certificates_under_tf32(report: Report) -> None:
    """Bounds on the largest singular value, with products in TF32."""
    side, seeds = (768, 10) if ON_GPU else (48, 4)
    wrong, widest = {"highest": 0, "high": 0}, {"highest": 0.0, "high": 0.0}
    for seed in range(seeds):
        torch.manual_seed(seed)
        weight = torch.randn(side, side) + 40 * torch.outer(torch.randn(side), torch.randn(side)) / side
        true = float(torch.linalg.eigvalsh(weight.double().mT @ weight.double())[-1].sqrt())
        for name in wrong:
            with precision(name):
                lower, upper = map(float, gram_iteration(weight.to(DEVICE)))
            wrong[name] += not lower * (1 - 1e-12) <= true <= upper * (1 + 1e-12)
            widest[name] = max(widest[name], upper / lower - 1)
    for name in wrong:
        report.note(f"{name}: widest bracket", widest[name])
        report.hold(f"{name}: bounds are bounds", wrong[name] == 0)


@check("hazards", 3.0, rank=6)
def deterministic_algorithms(report: Report) -> None:
    """``Trainer(deterministic=True)`` forbids some operations on a GPU."""
    monitor = WeightMonitor(every_n_steps=2)
    fit(gpt, TEXT, [monitor], deterministic=True, optimizer="fused")
    report.note("tags", len(monitor.history))
    report.hold("no measurement failed", monitor.failures == 0)
    report.hold("full spectra are there", "spectrum/nuclear" in monitor.history)


@check("hazards", 2.0, rank=4)
def weights_cached_by_autocast(report: Report) -> None:
    """A plain loop keeps weights in half precision for the whole region, moved or not."""
    small = Small()
    exact = HessianOperator(small.loss, small.parameters)
    update = -0.5 * exact.gradient
    with autocast(torch.bfloat16, cached=True):
        found = top_eigenvalues(HessianOperator(small.loss, small.parameters, backend="finite_difference"))
        critical = critical_sharpness(small.loss, small.parameters, update, rate=0.5).multiple
    true = critical_sharpness(small.loss, small.parameters, update, rate=0.5).multiple
    report.note("top eigenvalue", [float(found.values[0]), found.converged])
    report.note("critical multiple, with the cache and true", [critical, true])
    report.hold("no zero that calls itself converged", not (found.converged and float(found.values[0]) == 0))
    report.hold("critical sharpness within 20 %", abs(critical / true - 1) < 0.2)


@check("hazards", 6.0, rank=7)
def blocks_after_a_resume(report: Report) -> None:
    """Checkpoints are loaded to the CPU, block vectors with them."""

    def monitor() -> SharpnessMonitor:
        return SharpnessMonitor(every_n_steps=2, quantities=["hessian", "blocks"])

    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = fit(gpt, TEXT, [monitor()], max_steps=STEPS // 2)
        trainer.save_checkpoint(f"{folder}/half.ckpt")
        resumed = monitor()
        fit(gpt, TEXT, [resumed], checkpoint=f"{folder}/half.ckpt")
    report.hold("no measurement failed", resumed.failures == 0)
    report.hold("blocks are there", "sharpness/block" in resumed.history)


@check("hazards", 2.0, rank=5)
def a_default_device(report: Report) -> None:
    """``torch.set_default_device`` moves what is made without a word."""
    torch.set_default_device(DEVICE)
    try:
        network = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(network.parameters())
        rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=0), network)
        for _ in range(4):
            optimizer.zero_grad()
            network(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        report.note("ratios", rates.ratios)
        report.hold("steers", len(rates.ratios) == 2)
    finally:
        torch.set_default_device(None)


@check("hazards", 4.0, rank=12)
def graphs_are_freed(report: Report) -> None:
    """What a reading leaves on the device, once workspaces are there that stay for good."""
    if not ON_GPU:
        raise Skip("memory of a GPU is counted")
    network = gpt(width=256, depth=4, context=256).to(DEVICE)
    batch = [torch.randint(256, (16, 257), device=DEVICE)]

    def measure() -> None:
        operator = HessianOperator(lambda: loss_of(network, batch), dict(network.named_parameters()))
        top_eigenvalues(operator, certify=True)

    allocated = []
    for _ in range(4):
        measure()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated() / 2**20)
    report.note("MiB allocated after each of four readings", allocated)
    report.hold("no more after the fourth than after the second", allocated[3] <= allocated[1] + 0.25)


@check("hazards", 8.0, rank=11)
def out_of_memory(report: Report) -> None:
    """The run goes on, bitwise the same."""
    if not ON_GPU:
        raise Skip("memory of a GPU is filled")

    def train(*callbacks: Any) -> dict[str, Tensor]:
        return state(*fit(lambda: gpt(width=512, depth=4, heads=8), TEXT, callbacks))

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plain = train()
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.6 * peak / total))
    monitor = DynamicsMonitor("full", budget=None, every_n_steps=2)
    try:
        seen = train(monitor)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    report.note("measurements that failed", monitor.failures)
    report.note("what differs", sorted(differing(plain, seen))[:4])
    report.hold("bitwise equal", not differing(plain, seen))


@check("hazards", 3.0, rank=20)
def gradients_on_a_second_gpu(report: Report) -> None:
    """A reading waits for the device that holds the gradients, not for the current one."""
    if not ON_GPU or torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    torch.cuda.set_device(0)
    network = nn.Linear(4096, 4096).to("cuda:1")
    reader, wrong = GradientReader(describe_layers(network), "sign"), 0
    for step in range(50):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, float(step + 1))
        reader.begin(step)
        wrong += abs(float(reader.read().wait().l1[0]) / (4096**2 * (step + 1)) - 1) > 1e-3
    report.hold("all norms are right", wrong == 0)
