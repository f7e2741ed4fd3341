"""What the processes of Ekya say to one another: typed data, messages, sockets, telemetry.

Imports none of the other packages. ``docs/protocol.md`` is the authoritative description.
"""

__version__ = "0.1.0"
