"""What each of two processes does, begun by `accelerate launch`: stage 1's losses and gradients of its half of a batch.

accelerate launch --multi_gpu --num_processes 2 stage1_of_two.py ddp|fsdp2 FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from test_modeling_qformer import NEGATIVES, pictures_and_captions  # noqa: E402
from tiny import tiny_stage1  # noqa: E402

from vlbridge.modeling.modeling_contrastive import gather  # noqa: E402


def refused(model, data: dict, rank: int) -> str:
    """What is said to batches of two sizes."""
    try:
        model(**{name: tensor[: 2 - rank] for name, tensor in data.items()})
    except ValueError as error:
        return str(error)
    return ""


def main(strategy: str, output: str) -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    half = slice(2 * rank, 2 * rank + 2)
    model, _ = tiny_stage1()
    data = {name: tensor[half] for name, tensor in pictures_and_captions().items()}
    if rank == 0:  # texts of the first process are shorter
        data.update((name, data[name][:, :6]) for name in ("input_ids", "attention_mask"))
    negatives = {name: tensor[half] for name, tensor in NEGATIVES.items()}
    if strategy == "fsdp2":
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in (*model.bridge.qformer.layers, *model.vision_model.encoder.layers, model):
            fully_shard(layer, mesh=mesh)
        parallel = model
    else:
        parallel = accelerator.prepare(model)
    outputs = parallel(**data, **negatives)
    accelerator.backward(outputs.loss)
    found = {"processes": accelerator.num_processes, "backend": torch.distributed.get_backend()}
    for name, parameter in model.bridge.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        assert isinstance(parameter, DTensor) == (strategy == "fsdp2"), name
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg"):
        found[name] = gather(outputs[name].detach()[None]).mean()
    found["drawn"] = gather(parallel(**data).image_negatives)
    found["refused"] = refused(parallel, data, rank)
    if accelerator.is_main_process:
        torch.save(found, output)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
