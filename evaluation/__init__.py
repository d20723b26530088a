"""Evaluating bridges on published benchmarks."""

from .evaluation_run import evaluate
from .evaluation_tasks import TaskError, load_task, task_names


__all__ = ["TaskError", "evaluate", "load_task", "task_names"]
