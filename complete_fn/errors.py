"""The error tree, by who can act.

CompleteError
├── RequestError            the caller: the query, its options or its input are wrong
│   ├── UnknownModelError       the model is neither in the catalogue nor a folder nor a Hub id
│   ├── InvalidOptionError      an option, schema or template cannot be used
│   ├── UnknownParameterError   a route of the service has no query parameter of this name
│   ├── InputError              a file, column or table cannot be read or written as asked
│   ├── DatabaseAwayError       the database that gives the rows or takes the answers does not answer now
│   ├── TooLargeError           an upload, a body or a prompt is above the limit
│   ├── StorageFullError        the tenant's files and jobs take all the storage that it may have
│   ├── NotFoundError           the service has no such file, job or batch of this tenant
│   ├── KeyRefusedError         the API key is missing, unknown, expired or revoked
│   ├── ScopeError              the API key does not allow this
│   └── RateLimitError          the tenant or key has used up its tokens of this minute
├── EngineError             the operator: the engine cannot start, died twice, or its URL does not answer
│   ├── EngineMissingError      a library of the engine is not installed
│   └── EngineBusyError         the engine refuses work for now (429, 503)
├── JobError                the job: it is cancelled, or in a state that forbids the step
└── StoreError              the operator: answers and ledger cannot be read or written
    ├── StoreBusyError          another process holds the state longer than the timeout
    ├── StoreLostError          the database is away: it restarts, or the network is down
    ├── StoreUpgradedError      a newer version has upgraded the store under this process
    ├── StoreFullError          the disk of the state file is full, or fails
    ├── StorageError            files cannot be read or written: a full disk, or an object storage that is away
    └── DamagedFileError        a file that the service has written is missing or damaged

`RowError` is no exception but the value of one row; `strict` raises it inside a `RowFailedError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar, Self


class CompleteError(Exception):
    """Something went wrong."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    # Whether tenants of a service may read the message. An engine's or a store's may quote an endpoint's reply with a
    # key in it, or name paths, hosts and users.
    is_public: bool = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())

    def for_everybody(self) -> Self:
        """The error, with a message of our own that tenants may read."""
        self.is_public = True
        return self


class RequestError(CompleteError):
    """The request cannot be carried out as written."""

    status = 400
    is_public = True
    code = "invalid_request"


class UnknownModelError(RequestError):
    """The model is not in the catalogue. `complete-fn models` lists all."""

    status = 404
    code = "model_not_found"


class InvalidOptionError(RequestError):
    """An option has a value that cannot be used."""

    code = "invalid_option"


class UnknownParameterError(RequestError):
    """The route has no such query parameter. `param` is its name."""

    code = "unknown_parameter"

    def __init__(self, message: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InputError(RequestError):
    """The input or output cannot be used."""

    code = "invalid_input"


class DatabaseAwayError(InputError):
    """The database that gives the rows or takes the answers does not answer now."""

    status = 503
    is_public = False  # its driver names host, port and user
    code = "database_unavailable"
    retryable = True


class TooLargeError(InputError):
    """The upload is too large."""

    status = 413
    code = "too_large"


class StorageFullError(RequestError):
    """The tenant's files and jobs take all the storage that it may have."""

    status = 403
    code = "storage_full"


class NotFoundError(RequestError):
    """There is nothing of this name."""

    status = 404
    code = "not_found"


class KeyRefusedError(RequestError):
    """The API key is missing, unknown, expired or revoked."""

    status = 401
    code = "invalid_api_key"


class ScopeError(RequestError):
    """The API key does not allow this."""

    status = 403
    code = "not_allowed"


class RateLimitError(RequestError):
    """The tokens of this minute are used up. `headers` say when to try again."""

    status = 429
    code = "rate_limit_exceeded"
    retryable = True

    def __init__(self, message: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = headers or {}


class RowFailedError(RequestError):
    """A row failed and `strict` was asked for."""

    code = "row_failed"


class EngineError(CompleteError):
    """The engine cannot do the work."""

    status = 503
    code = "engine_unavailable"
    retryable = True


class EngineMissingError(EngineError):
    """A library that the engine needs is not installed."""

    status = 501
    code = "engine_missing"
    retryable = False


class UsageRefusedError(EngineError):
    """The endpoint reports more tokens than it was asked for, so that no cap can be kept."""

    status = 502
    code = "usage_refused"
    retryable = False


class EngineBusyError(EngineError):
    """The engine refuses work for now."""

    status = 429
    code = "engine_busy"


class JobError(CompleteError):
    """The job is not in a state that allows this."""

    status = 409
    is_public = True
    code = "job_conflict"


class StoreError(CompleteError):
    """Answers and ledger cannot be read or written."""

    code = "store_unavailable"


class StoreBusyError(StoreError):
    """Another process holds the state."""

    status = 503
    code = "store_busy"
    retryable = True


class StoreLostError(StoreError):
    """The database is away."""

    status = 503
    retryable = True


class StoreUpgradedError(StoreError):
    """A newer complete-fn has upgraded the store. This process ends what it began; restart it in the new version."""

    status = 503
    is_public = True
    code = "store_upgraded"
    retryable = True


class StoreFullError(StoreError):
    """The disk with answers and ledger is full, or fails."""

    status = 503
    retryable = True


class StorageError(StoreError):
    """Files cannot be read or written now: a disk is full, or an object storage is away."""

    status = 503
    code = "storage_unavailable"
    retryable = True


class DamagedFileError(StoreError):
    """A file that the service has written is missing or damaged."""

    is_public = True
    code = "file_damaged"


# The closed set of row error codes, with what each one means.
ROW_ERRORS: dict[str, str] = {
    "prompt_too_long": "the rendered prompt leaves no room for an answer within the model's context",
    "truncated": "the answer was cut by a limit that the caller did not set",
    "schema_mismatch": "the answer does not satisfy the response_format, or is none of the choices",
    "invalid_request": "the prompt cannot be sent (lone surrogate, empty messages), or the engine refused or ended it",
    "budget_exceeded": "the remaining budget does not cover the row at list price",
    "cancelled": "the run was cancelled before the row was done",
    "timeout": "the engine did not finish the row in time",
    "engine_failed": "the engine died or hung at this row, twice while it ran alone",
    "usage_refused": "the endpoint reports more tokens than it was asked for; the row is billed as far as asked for",
    "blocked": "the endpoint's content filter or the model itself refused the row",
}


def did_you_mean(name: str, known: Iterable[str], form: str = "{!r}", cutoff: float = 0.6) -> str:
    """A sentence to put behind an error's first one, with the known name most like this one; empty if none is alike."""
    near = difflib.get_close_matches(name, list(known), 1, cutoff)
    return f" Did you mean {form.format(near[0])}?" if near else ""
