"""The pretended device notices what a GPU would, and nothing else."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.pretended_cuda.device import PretendedCuda
from tests.pretended_cuda.graphs import CaptureError
from tests.pretended_cuda.torch_cuda import pretended_cuda


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Captures a function as a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def kinds(cuda: PretendedCuda) -> dict[str, int]:
    """How often which kind of event happened; where it happened is not of ours."""
    return {event.kind: count for event, count in cuda.events.items()}


def test_it_is_there_until_the_block_ends() -> None:
    before = torch.cuda.is_available()
    with pretended_cuda(total_bytes=1 << 20):
        tensor = torch.ones(2, 3, device="cuda")
        assert (tensor.device, tensor.is_cuda) == (torch.device("cuda", 0), True)
        assert torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] == 24
        del tensor
        assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.is_available() == before


@pytest.mark.parametrize(
    "operation",
    [
        lambda on_gpu, on_cpu: on_gpu + on_cpu,
        lambda on_gpu, on_cpu: on_cpu @ on_gpu,
        lambda on_gpu, on_cpu: torch.cat([on_gpu, on_cpu]),
        lambda on_gpu, on_cpu: on_cpu[on_gpu.long()],
        lambda on_gpu, on_cpu: torch.nn.functional.linear(on_cpu, on_gpu),
        lambda on_gpu, on_cpu: torch.where(on_gpu > 0, on_cpu, on_gpu),
    ],
)
def test_devices_do_not_mix(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pretended_cuda():
        with pytest.raises(RuntimeError, match="device"):
            operation(torch.ones(3, 3, device="cuda"), torch.ones(3, 3))
        assert (torch.ones(3, 3, device="cuda") * torch.tensor(2.0)).sum().item() == 18  # a number may lie on the CPU


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (lambda t: t.sum().item(), "value"),
        (lambda t: bool((t > 0).all()), "value"),
        (lambda t: t[t > 0], "value"),
        (lambda t: t.nonzero(), "value"),
        (lambda t: t.masked_select(t > 0), "value"),
        (lambda t: t.index_put_([t > -1], torch.zeros(4, device="cuda")), "value"),
        (lambda t: torch.equal(t, t), "value"),
        (lambda t: t.cpu(), "download"),
        (lambda t: t.tolist(), "download"),
        (lambda t: t.copy_(torch.zeros(4)), "upload"),
        (lambda t: t[torch.tensor([1, 2])], "upload"),
        (lambda t: torch.tensor([1.0], device=t.device), "upload"),
        (lambda t: torch.zeros(4).to(t.device, non_blocking=True), "upload"),  # from pageable memory
        (lambda t: torch.zeros(4).pin_memory().to(t.device, non_blocking=True), "upload later"),
        (lambda t: torch.empty(4, pin_memory=True).to(t.device, non_blocking=True), "upload later"),
        (lambda t: t.to("cpu", non_blocking=True), "download later"),
        (lambda t: torch.cuda.synchronize(), "synchronize"),
        (lambda t: torch.cuda.current_stream().synchronize(), "synchronize"),
    ],
)
def test_waits_and_transfers_are_counted_and_forbidden_in_captures(
    operation: Callable[[Tensor], object], kind: str
) -> None:
    with pretended_cuda() as cuda:
        tensor = torch.ones(4, device="cuda")
        operation(tensor)
        assert kinds(cuda) == {kind: 1}
        with pytest.raises(CaptureError, match=f"{kind} in tests/pretended_cuda/test_device.py:"):
            captured(lambda: operation(tensor))
        operation(tensor)  # the capture has ended


def test_several_gpus_have_their_own_streams_and_one_is_current() -> None:
    with pretended_cuda(cards=2) as cuda:
        assert torch.cuda.device_count() == 2
        on_first, on_second = torch.ones(2, device="cuda"), torch.ones(2, device="cuda:1")
        assert (on_first.device.index, on_second.device.index, (on_second + 1).device.index) == (0, 1, 1)
        assert torch.cuda.current_stream() != torch.cuda.current_stream("cuda:1")
        with pytest.raises(RuntimeError, match="device"):
            on_first + on_second
        assert on_first.to("cuda:1").device.index == 1
        stream = torch.cuda.Stream("cuda:1")
        with torch.cuda.stream(stream):  # which makes its GPU the current one
            assert torch.cuda.current_device() == 1
            assert torch.ones(1, device="cuda").device.index == 1
            assert torch.cuda.current_stream() == stream
        with torch.cuda.device(1):
            assert torch.cuda.Stream().device.index == 1
            assert torch.cuda.current_stream() == torch.cuda.default_stream("cuda:1")
        assert torch.cuda.current_device() == 0
        assert cuda.cards_used == {0, 1}


def test_memory_is_pinned_for_the_current_gpu() -> None:
    with pretended_cuda(cards=2) as cuda:
        with torch.cuda.device(1):
            torch.empty(4, pin_memory=True)
        assert cuda.cards_used == {1}


def test_a_capture_is_of_one_gpu() -> None:
    with pretended_cuda(cards=2) as cuda:
        tensor = torch.ones(4, device="cuda:1")
        with pytest.raises(CaptureError, match=r"Inside a capture on cuda:0: aten\.add\.Tensor on cuda:1"):
            captured(lambda: tensor + 1)
        with torch.cuda.device(1):
            graph = captured(lambda: tensor.add_(1))
        graph.replay()
        assert tensor.tolist() == [2, 2, 2, 2]
        assert cuda.captures[-1].stream.device == tensor.device


def test_what_stays_on_the_device_waits_for_nothing() -> None:
    with pretended_cuda() as cuda:
        tensor = torch.arange(6, device="cuda").view(2, 3).float()
        tensor[:, 1] = 7
        tensor[tensor > 6] = -torch.inf  # one value needs no places
        tensor.masked_fill(tensor < 0, 1.0).topk(2).values.softmax(-1)
        torch.full((2,), 3.0, device="cuda").index_select(0, torch.zeros(1, dtype=torch.int64, device="cuda"))
        assert not cuda.events


def test_a_capture_runs_nothing_and_a_replay_runs_on_what_the_memory_then_holds() -> None:
    with pretended_cuda():
        given, result = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
        outputs = []

        def run() -> None:
            outputs.append((given + 1).view(1, 2))
            result.add_(outputs[0][0])

        graph = captured(run)
        assert result.tolist() == [0, 0]
        assert outputs[0].isnan().all()
        graph.replay()
        given.fill_(5)
        graph.replay()
        assert (outputs[0].tolist(), result.tolist()) == ([[6, 6]], [8, 8])


def test_a_replay_of_freed_memory_is_refused() -> None:
    with pretended_cuda():
        kept, given = torch.zeros(2, device="cuda"), [torch.ones(2, device="cuda")]
        graph = captured(lambda: kept.add_(given[0]))
        graph.replay()
        given.clear()
        with pytest.raises(CaptureError, match="1 tensors that have been freed"):
            graph.replay()


def test_captures_name_their_pool_and_only_a_global_one_binds_other_threads() -> None:
    with pretended_cuda() as cuda, ThreadPoolExecutor(1) as thread:
        tensor, graph = torch.ones(2, device="cuda"), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            tensor + 1
            assert thread.submit(tensor.tolist).result() == [1, 1]
        with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=graph.pool()), pytest.raises(CaptureError):
            thread.submit(tensor.tolist).result()
        captured(lambda: tensor + 1)
        pools = [capture.pool for capture in cuda.captures]
        assert pools[:2] == [pool, pool]
        assert pools[2] != pool
        assert cuda.captures[0].stream != torch.cuda.current_stream()


class TestStreams:
    def test_a_read_must_be_ordered_after_the_write(self) -> None:
        side_waits: list[Callable[[torch.cuda.Stream, torch.cuda.Stream], object]] = [
            lambda side, main: side.wait_stream(main),
            lambda side, main: side.wait_event(main.record_event()),
            lambda side, main: main.synchronize(),
            lambda side, main: torch.cuda.synchronize(),
            lambda side, main: torch.ones(1, device="cuda").item(),
        ]
        for wait in [lambda side, main: None, *side_waits]:
            with pretended_cuda() as cuda:
                side, main = torch.cuda.Stream(), torch.cuda.current_stream()
                tensor = torch.ones(2, device="cuda")
                wait(side, main)
                with torch.cuda.stream(side):
                    assert torch.cuda.current_stream() == side
                    tensor + 1
                main.wait_stream(side)
                assert len(cuda.hazards) == (wait not in side_waits)

    def test_memory_in_use_by_another_stream_must_not_be_freed(self) -> None:
        for keeps, waits in ((False, False), (True, False), (False, True)):
            with pretended_cuda() as cuda:
                side, main = torch.cuda.Stream(), torch.cuda.current_stream()
                tensor = torch.ones(2, device="cuda")
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    tensor + 1
                if keeps:
                    tensor.record_stream(side)
                if waits:
                    main.wait_stream(side)
                del tensor
                assert len(cuda.hazards) == (not keeps and not waits)

    def test_streams_come_round_again_and_priorities_do_not_meet(self) -> None:
        with pretended_cuda():
            streams = [torch.cuda.Stream() for _ in range(40)]
            assert len(set(streams)) == 32
            assert torch.cuda.Stream(priority=-1) not in streams


def test_memory_ends() -> None:
    with pretended_cuda(total_bytes=1000):
        tensor = torch.zeros(200, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="1600 bytes are wanted; the pretended GPU has 200"):
            tensor.repeat(2)
        assert torch.cuda.memory_allocated() == 800


def test_memory_of_a_graph_ends_with_it() -> None:
    with pretended_cuda():
        tensor = torch.zeros(200, device="cuda")
        graph = captured(lambda: tensor.add_(tensor * 2))
        assert torch.cuda.memory_allocated() == 1600
        del graph
        assert torch.cuda.memory_allocated() == 800
