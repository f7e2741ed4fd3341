"""The exception tree of Ekya; each class says who can recover.

EkyaError                     anything this project raises on purpose
|-- InputError                the user: a file, a field or a flag is wrong (exit code 2)
|   `-- ConfigError           the user: a configuration file is wrong; names file and key
|-- ProtocolError             the peer: a message is malformed; it is counted and dropped
|   `-- VersionMismatchError  the user: two releases that cannot talk are being mixed
|-- UnreachableError          the user or time: nobody answers at an address
|-- PlanError                 the planner: a plan or a problem breaks a rule of the model
|-- CheckpointError           the executor: a checkpoint is corrupt or missing; keep the old one
|-- DeviceError               the user: the device does not exist or cannot be shared
`-- WorkerError               the supervisor: a worker failed to start or died
"""


class EkyaError(Exception):
    """Base of every error raised on purpose."""


class InputError(EkyaError):
    """The user gave something unusable; the message names it and says what to do."""


class ConfigError(InputError):
    """A configuration file is wrong; the message names the file and the key."""


class ProtocolError(EkyaError):
    """A message cannot be understood. The receiver counts and drops it, and goes on."""


class VersionMismatchError(ProtocolError):
    """The peer speaks another protocol version."""


class UnreachableError(EkyaError):
    """Nobody answers at an address within the time allowed."""


class PlanError(EkyaError):
    """A problem or plan breaks a rule of the execution model."""


class CheckpointError(EkyaError):
    """A checkpoint is missing, truncated or does not match its manifest."""


class DeviceError(InputError):
    """A device does not exist or cannot be shared as asked."""


class WorkerError(EkyaError):
    """A worker could not be started, did not become ready, or died."""
