"""Hardware profiles: settings for a class of machines, chosen by the hardware.

Shipped profiles are next to this file; users add their own in `user_directory()`. A profile applies only on request
(`profile="auto"`, or its name), so no budget is ever set implicitly.
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
