"""What a sweep takes from Optuna: its storage, opened so that claims are exact, its samplers and its pruners."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage

from ups_fast.seeds import derive
from ups_fast.sweep_space import Axis
from ups_fast.words import line_of, shown

optuna.logging.set_verbosity(logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

SAMPLERS, PRUNERS = ("tpe", "random", "gp"), ("none", "median", "halving")
TRIES, RETRY_SECONDS = 3, 0.5  # of making the tables
GONE = (StorageInternalError, sqlalchemy.exc.DBAPIError)
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}


def open_storage(url: str) -> RDBStorage:
    timeout = {"connect_args": {"timeout": 30}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    with one_sentence(url):
        if url.startswith("sqlite"):
            _check_tables(url)
        for left in reversed(range(TRIES)):  # two processes may make the tables at once
            try:
                storage = RDBStorage(url, engine_kwargs=timeout)
                break
            except sqlalchemy.exc.DBAPIError as error:
                twice = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
                if not left or not twice:
                    raise
                time.sleep(RETRY_SECONDS)
    if storage.engine.dialect.name == "sqlite":
        _lock_first(storage.engine)
    return storage


def file_url(path: Path) -> str:
    """The URL of a file of SQLite, whatever characters are in its name."""
    return sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()


def _check_tables(url: str) -> None:
    """A file of SQLite that is somebody else's gets no tables of ours, and memory none that nobody else sees."""
    if sqlalchemy.make_url(url).database in (None, "", ":memory:"):
        raise ValueError(
            f"--storage must be a file that all workers can open, such as sqlite:///sweep.db, got {shown(url)}"
        )
    engine = sqlalchemy.create_engine(url)
    names = sqlalchemy.inspect(engine).get_table_names()
    engine.dispose()
    if names and "studies" not in names:
        raise ValueError(
            f"--storage {shown(url)} holds tables of something else, such as {shown(names[0])}: name another file"
        )


def _lock_first(engine: Any) -> None:
    """SQLite knows no SELECT FOR UPDATE: two processes could both read that a trial waits, and both take it."""

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # Python's own BEGIN comes too late

    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", connected)
    sqlalchemy.event.listen(engine, "begin", begun)
    engine.dispose()  # connections that were opened before


class one_sentence:
    """Turns what is wrong with a storage into a ValueError that names it, without its password."""

    def __init__(self, url: str) -> None:
        try:
            self.url = sqlalchemy.make_url(url).render_as_string(hide_password=True)
        except sqlalchemy.exc.ArgumentError:
            raise ValueError(
                f"--storage must be a URL such as sqlite:///sweep.db or postgresql://user@host/name, got {shown(url)}"
            ) from None

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if error is None:
            return
        if isinstance(error, (sqlalchemy.exc.SQLAlchemyError, StorageInternalError)):
            raise ValueError(f"--storage {self.url} cannot be used: {why(error)}") from error
        if isinstance(error, ImportError):
            missing = getattr(error.__cause__ or error, "name", None) or line_of(error)
            raise ValueError(
                f"--storage {self.url} needs a package that is not installed: pip install "
                f"'{_DRIVERS.get(missing, missing)}'"
            ) from error
        if isinstance(error, (RuntimeError, AssertionError)):
            raise ValueError(f"--storage {self.url} is of another version: {line_of(error)}") from error


def distribution(axis: Axis) -> BaseDistribution:
    if axis.words:
        return CategoricalDistribution(axis.words)
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def sampler(name: str, index: int) -> BaseSampler:
    """One for each point, seeded by it: what it draws does not depend on which process draws."""
    seed = derive(0, "sweep", index) % 2**32
    if name == "random":
        return RandomSampler(seed=seed)
    if name == "gp":
        return GPSampler(seed=seed)
    return TPESampler(seed=seed, multivariate=True, constant_liar=True)


def pruner(name: str) -> BasePruner:
    """Rounds are its rungs. Round 0 learns from the labels alone, and decides nothing."""
    if name == "median":
        return MedianPruner(n_startup_trials=4, n_warmup_steps=1)
    if name == "halving":
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    return NopPruner()


def why(error: BaseException) -> str:
    """What a storage that does not answer says."""
    inner = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    return shown(line_of(getattr(inner, "orig", None) or inner))  # type: ignore[arg-type]
