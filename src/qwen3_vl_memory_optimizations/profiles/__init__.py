"""Hardware profiles: settings that suit a sort of machine, chosen by what this one is.

Those of this package lie beside this file; a user adds others in `user_directory()`. A profile is used only where it is
asked for (`profile="auto"`, or its name): nobody gets a budget that was not wanted.
"""

from .choice import AUTO, Choice, Considered, choose, configure, user_directory
from .profile import Condition, Profile, load_profile

__all__ = [
    "AUTO",
    "Choice",
    "Condition",
    "Considered",
    "Profile",
    "choose",
    "configure",
    "load_profile",
    "user_directory",
]
