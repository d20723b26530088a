"""Looking inside bridges: gates, query tokens, attention, whether a picture was used, and what images cost."""

from .inspection_attention import answer_attention, bridge_attention, patch_attention, recording
from .inspection_budget import measure_budget, token_budget
from .inspection_gates import GateLogger, gate_history, gates, image_variance_share, visual_tokens
from .inspection_geometry import patch_grids, token_grids
from .inspection_looking import answer_of, did_it_look, occlusion
from .inspection_queries import effective_rank, similarity_across, similarity_within, specialisation
from .inspection_report import inspect_model, report_html


__all__ = [
    "GateLogger",
    "answer_attention",
    "answer_of",
    "bridge_attention",
    "did_it_look",
    "effective_rank",
    "gate_history",
    "gates",
    "image_variance_share",
    "inspect_model",
    "measure_budget",
    "occlusion",
    "patch_attention",
    "patch_grids",
    "recording",
    "report_html",
    "similarity_across",
    "similarity_within",
    "specialisation",
    "token_budget",
    "token_grids",
    "visual_tokens",
]
