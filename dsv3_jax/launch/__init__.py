"""Many processes: which one of how many this is, joining the others, and starting and watching them.

Nothing here imports JAX before a process joins, so that a launcher costs 20 MB and starts at once.
"""

from dsv3_jax.launch.cluster import Member, detect
from dsv3_jax.launch.join import joined
from dsv3_jax.launch.local import Command, follow_parent, local_commands, supervised_command, take_launch
from dsv3_jax.launch.watch import watch

__all__ = [
    "Command",
    "Member",
    "detect",
    "follow_parent",
    "joined",
    "local_commands",
    "supervised_command",
    "take_launch",
    "watch",
]
