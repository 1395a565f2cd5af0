"""Synthetic worlds: seeded pictures with exact truth."""

from .scene_asking import Question
from .scene_questions import KINDS, plain_questions, questions
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
