"""Synthetic worlds: seeded pictures with exact truth."""

from .scene_asking import Question
from .scene_plain import plain_questions
from .scene_questions import KINDS, questions
from .scenes import COLORS, SHAPES, SIZES, TEXTURES, Object, Scene, SceneConfig, scene

__all__ = [
    "COLORS",
    "KINDS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Object",
    "Question",
    "Scene",
    "SceneConfig",
    "plain_questions",
    "questions",
    "scene",
]
