"""Training by one process, and by two with DDP, with FSDP2 and with ZeRO-3; what became of it is written to files.

    python train_of_two.py FOLDER [one ddp fsdp2 zero3]

Everything is imported once; each process is a fork of this one with the environment that a launcher gives it. `FOLDER`
then holds, for each world, a run's folder per job, and what each process found in `{world}_{rank}.json`. `zero3` needs
DeepSpeed and a C++ compiler; if WITH_ZERO3 is set (`make zero3`), it is among the worlds that run by default.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent))

from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from killed_runs import forked  # noqa: E402
from packaging.version import Version  # noqa: E402
from toy_runs import CAPTIONS, save_data, save_parts, toy_records, toy_trainer  # noqa: E402
from transformers.integrations import unset_hf_deepspeed_config  # noqa: E402

from vlbridge.modeling import modeling_qformer_pretraining  # noqa: E402
from vlbridge.training import training_resumable, training_run  # noqa: E402
from vlbridge.training.training_recipes import Recipe  # noqa: E402


FSDP2_ON_CPUS = Version(torch.__version__) >= Version("2.7")  # torch 2.6 has it for GPUs alone
WORLDS = (
    "one",
    "ddp",
    *(["fsdp2"] if FSDP2_ON_CPUS else []),
    *(["zero3"] if os.environ.get("WITH_ZERO3") else []),
)
# what `Trainer` is told besides the environment
LAUNCHED = {
    "one": {"use_cpu": True},
    "ddp": {"use_cpu": True},
    "fsdp2": {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2}},
    "zero3": {
        "use_cpu": True,
        "deepspeed": {
            **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto"),
            **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto"),
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # or small tensors stay whole
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    },
}
# a tied language model among them
CASES = {"mlp": "llama_tied", "qformer": "llama", "perceiver": "llama", "stage1": "llama"}
STEPS, SAVED_AT = 20, 10


def hardest_negatives(logits, positives, **_) -> torch.Tensor:
    """Instead of drawing, which takes random numbers in another order where there are two processes."""
    return logits.masked_fill(positives, -torch.inf).argmax(dim=1)


def records_for(bridge: str) -> list[dict]:
    if bridge == "stage1":
        return [{**record, "caption": f"w{n} w{n + 1}"} for n, record in enumerate(toy_records())]
    return toy_records()


def broken(records: list[dict], *numbers: int) -> list[dict]:
    picture = {"path": "/nowhere.png", "bytes": None}
    return [{**r, "images": [picture]} if number in numbers else r for number, r in enumerate(records)]


def said(call) -> str:
    """The message of the error that something ends with."""
    try:
        call()
    except (RuntimeError, OSError) as error:  # those of training are among them
        return f"{type(error).__name__}: {error}"
    return ""


class World:
    """What one process of a world does.

    Args:
        root: Folder of all.
        name: `"one"`, `"ddp"` or `"fsdp2"`.
        rank: Number of the process.
    """

    def __init__(self, root: Path, name: str, rank: int):
        self.root, self.name, self.rank, self.found = root, name, rank, {}

    def build(self, job: str, bridge: str, *, language: str | None = None, **options):
        """A trainer with a batch of four, of all processes together, without dropout: its masks would differ."""
        given = {
            "records": records_for(bridge), "max_steps": 2, "lr_scheduler_type": "constant", **LAUNCHED[self.name],
            "per_device_train_batch_size": 4 if self.name == "one" else 2, "dataloader_pin_memory": False,
            "adam_epsilon": 1e-4,  # or gradients that should be zero, and are noise, are made as large as others
        }  # fmt: skip
        unset_hf_deepspeed_config()  # the last trainer's: a model is composed before there are arguments
        make = toy_trainer(self.root / "parts", bridge, language=language or CASES[bridge], dropout=0.0)
        return make(self.root / self.name / job, **{**given, **options})

    def curves(self) -> None:
        for bridge in CASES:
            trainer = self.build(bridge, bridge, max_steps=STEPS, save_steps=SAVED_AT)
            trainer.train()
            trainer.save_result({"note.txt": "whole"})
            self.found[bridge] = curve(trainer)

    def goes_on(self) -> None:
        for bridge in ("mlp", "perceiver"):
            trainer = self.build(f"{bridge}_again", bridge, max_steps=STEPS)
            trainer.train(resume_from_checkpoint=str(self.root / self.name / bridge / f"checkpoint-{SAVED_AT}"))
            trainer.save_result({})
            self.found[f"{bridge}_again"] = curve(trainer)

    def of_another_launch(self) -> None:
        trainer = self.build("other", "mlp")
        checkpoint = self.root / "one" / "mlp" / f"checkpoint-{SAVED_AT}"
        self.found["other_launch"] = said(lambda: trainer.train(resume_from_checkpoint=str(checkpoint)))

    def whole_model(self) -> None:
        trainer = self.build("whole", "mlp", freeze={"language_model": False})
        trainer.train()
        trainer.save_result({})

    def broken_records(self) -> None:
        for bridge in ("mlp", "stage1"):
            records = broken(records_for(bridge), 3)
            trainer = self.build(f"{bridge}_broken", bridge, records=records, keywords={"max_broken": 5})
            trainer.train()
            self.found[f"{bridge}_broken"] = [trainer.num_skipped, trainer.skipped.total(), trainer.num_seen]
        trainer = self.build("too_broken", "mlp", records=broken(toy_records(), 1, 2, 5), keywords={"max_broken": 1})
        self.found["too_broken"] = said(trainer.train)

    def not_finite(self) -> None:
        """From the second step on something is not finite, in one process only."""
        for job, bridge, where in (
            ("loss", "mlp", "forward"),
            ("gradient", "mlp", "backward"),
            *([("stage1_loss", "stage1", "forward")] if self.name == "ddp" else []),
        ):
            trainer = self.build(f"bad_{job}", bridge, max_steps=4, gradient_accumulation_steps=2)
            if self.rank == (self.name != "one"):
                layer = trainer.model.bridge.linear_1 if bridge == "mlp" else trainer.model.bridge.vision_layer_norm
                calls = []

                def spoil(module, args, output, trainer=trainer, where=where, calls=calls):
                    calls.append(1)
                    if trainer.state.global_step >= 1:
                        if where == "forward":
                            return output * float("nan")
                        if output.requires_grad:
                            output.register_hook(lambda gradient: gradient * float("inf"))
                    return None

                layer.register_forward_hook(spoil)
            self.found[f"bad_{job}"] = said(trainer.train)

    def failing_saves(self) -> None:
        """The first process fails where it alone writes or pushes."""

        def failing(error):
            def fail(*args, **kwargs):
                raise error

            return fail

        own = vars(training_resumable).copy()
        for job, name, error in (
            ("bug", "save_weights", RuntimeError("a bug")),
            ("full", "save_weights", OSError(errno.ENOSPC, "No space left on device")),
            ("begin", "begin_checkpoint", OSError(errno.EACCES, "Permission denied")),
        ):
            trainer = self.build(f"failing_{job}", "mlp", save_steps=1)
            if self.rank == 0:
                setattr(training_resumable, name, failing(error))
            self.found[f"failing_{job}"] = [said(trainer.train), trainer.failed_saves]
            setattr(training_resumable, name, own[name])
        if self.rank == 0:
            training_resumable.push_folder = failing(OSError("the Hub does not answer"))
        self.found["failing_push"] = said(lambda: trainer.save_result({"note.txt": "there"}, push_to="me/bridge"))
        training_resumable.push_folder = own["push_folder"]

    def recipe(self) -> None:
        """A whole run: samples, evaluation, summary."""
        data, parts = self.root / "data", self.root / "parts"
        captions = {
            "source": "coco_captions",
            "path": str(data / "captions.json"),
            "options": {"images": str(data / "images")},
        }
        recipe = Recipe.from_dict(
            {
                "vision": str(parts / "vision"), "language": str(parts / "llama"), "bridge": "mlp", "data": [captions],
                "evaluation": [{**captions, "generate": 5, "max_new_tokens": 3}],
                "samples": {"every": 1, "count": 3, "max_new_tokens": 3},
                "arguments": {
                    "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none",
                    "disable_tqdm": True, **LAUNCHED[self.name],
                },
            }
        )  # fmt: skip
        asked, generate = [], training_run.generate

        def every_second_is_right(model, encoder, records, *args):
            asked.append([record["id"] for record in records])
            said = generate(model, encoder, records, *args)
            return [(wanted if int(wanted.split()[-1]) % 2 == 0 else text, wanted) for text, wanted in said]

        training_run.generate = every_second_is_right
        summary = training_run.train(recipe, self.root / self.name / "recipe")
        training_run.generate = generate
        self.found["asked"] = asked
        self.found["recipe"] = {name: summary[name] for name in ("evaluation", "skipped_records", "steps")}

    def run(self) -> None:
        self.curves()
        self.goes_on()
        if self.name in ("fsdp2", "zero3"):
            self.of_another_launch()
        self.whole_model()
        self.broken_records()
        if self.name != "one":
            self.not_finite()
            self.failing_saves()
        self.recipe()


def curve(trainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def work(root: Path, name: str, rank: int, port: int) -> None:
    """One process: as a launcher would have begun it, its output in a file."""
    signal.alarm(240)  # processes that wait for each other end one day
    log = os.open(root / f"{name}_{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    if name != "one":
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
    if name == "fsdp2":
        # accelerate shards what is on devices only: let it take the CPU for one, with gloo
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if name == "zero3":
        os.environ["DS_ACCELERATOR"] = "cpu"
    world = World(root, name, rank)
    try:
        world.run()
    except BaseException:
        traceback.print_exc()
        raise
    (root / f"{name}_{rank}.json").write_text(json.dumps(world.found))


def main(root: Path, worlds: tuple[str, ...] = WORLDS) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about changes in place: nothing here makes any
    modeling_qformer_pretraining.draw_negatives = hardest_negatives
    for language in dict.fromkeys(CASES.values()):
        save_parts(root / "parts", language)
    save_data(root / "data", len(CAPTIONS))
    for name in worlds:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [forked(lambda n=name, r=rank, p=port: work(root, n, r, p)) for rank in range(1 + (name != "one"))]
        codes = []
        while children:  # as a launcher does: the first that fails ends the others
            child, status = os.wait()
            children.remove(child)
            codes.append(status)
            if status:
                for other in children:
                    os.kill(other, signal.SIGTERM)
        if any(codes):
            raise SystemExit(f"{name} failed, see {root}/{name}_*.log")


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]) or WORLDS)
