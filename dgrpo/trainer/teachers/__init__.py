"""Teachers: a frozen model, the policy itself on another prompt, or a server's top k."""

from dgrpo.trainer.teachers.local import SelfTeacher, Teacher
from dgrpo.trainer.teachers.served import ServedTeacher

__all__ = ["SelfTeacher", "ServedTeacher", "Teacher"]
