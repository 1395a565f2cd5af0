"""The errors that people can meet, each with what was found and what was expected.

SightlineError
├── ConfigError        a name or value in a configuration is unknown or contradicts another      HTTP 400
├── CheckpointError    a file of weights is damaged, incomplete or belongs to another model       HTTP 500
├── DataError          a sample of a data set cannot be used                                      HTTP 422
├── InputError         what a user handed in (picture, question, conversation) cannot be used     HTTP 400
├── CapacityError      the request does not fit: context, memory, size limits                     HTTP 413
└── RemoteError        somebody else's service refused, failed or could not be reached            HTTP 502
"""


class SightlineError(Exception):
    """Base of every error that is the caller's to fix; the message is one line."""

    http_status = 500
    exit_code = 2


class ConfigError(SightlineError):
    """A configuration names something unknown or contradicts itself."""

    http_status = 400


class CheckpointError(SightlineError):
    """Weights are damaged, incomplete, or do not belong to this model."""

    http_status = 500


class DataError(SightlineError):
    """A sample of a data set cannot be used."""

    http_status = 422


class InputError(SightlineError):
    """A picture, question or conversation handed in by a user cannot be used."""

    http_status = 400


class CapacityError(SightlineError):
    """A request is larger than what the model or the machine can hold."""

    http_status = 413


class RemoteError(SightlineError):
    """A service that this program asked refused, failed or could not be reached."""

    http_status = 502
    exit_code = 69
