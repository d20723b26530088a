"""Evaluating bridges on published benchmarks."""

from .evaluation_bakeoff import BakeoffError, bakeoff
from .evaluation_run import evaluate
from .evaluation_tasks import TaskError, load_task, task_names


__all__ = ["BakeoffError", "TaskError", "bakeoff", "evaluate", "load_task", "task_names"]
