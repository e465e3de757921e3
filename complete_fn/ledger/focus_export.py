"""`export` writes the ledger as charges with the columns of FOCUS 1.2, the FinOps cost and usage specification.

The file has one row per hour, tenant, user, job, query tag, model and price class. Our own columns begin with `x_`.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import sqlalchemy as sa
from pyarrow import parquet

from complete_fn.errors import InputError
from complete_fn.ledger.time_span import TimeSpan
from complete_fn.store.records import money
from complete_fn.store.rollup import HOUR, SUMMED
from complete_fn.store.store import Store
from complete_fn.store.tables import summed

MONEY, QUANTITY, TIME = pa.decimal128(28, 9), pa.decimal128(28, 9), pa.timestamp("us", "UTC")
SCHEMA = pa.schema(
    [
        ("BillingAccountId", pa.string()),
        ("SubAccountId", pa.string()),
        ("SubAccountName", pa.string()),
        ("BillingPeriodStart", TIME),
        ("BillingPeriodEnd", TIME),
        ("ChargePeriodStart", TIME),
        ("ChargePeriodEnd", TIME),
        ("ChargeCategory", pa.string()),
        ("ChargeDescription", pa.string()),
        ("ChargeFrequency", pa.string()),
        ("BillingCurrency", pa.string()),
        ("BilledCost", MONEY),
        ("EffectiveCost", MONEY),
        ("ContractedCost", MONEY),
        ("ListCost", MONEY),
        ("ConsumedQuantity", QUANTITY),
        ("ConsumedUnit", pa.string()),
        ("PricingQuantity", QUANTITY),
        ("PricingUnit", pa.string()),
        ("PricingCategory", pa.string()),
        ("ServiceName", pa.string()),
        ("ServiceCategory", pa.string()),
        ("ServiceSubcategory", pa.string()),
        ("ProviderName", pa.string()),
        ("PublisherName", pa.string()),
        ("InvoiceIssuerName", pa.string()),
        ("ResourceId", pa.string()),
        ("ResourceName", pa.string()),
        ("SkuId", pa.string()),
        ("SkuMeter", pa.string()),
        ("Tags", pa.string()),
        ("x_Rows", pa.int64()),
        ("x_SavedCost", MONEY),
        ("x_DeviceSeconds", pa.float64()),
        ("x_SavedDeviceSeconds", pa.float64()),
        ("x_PriceBasis", pa.string()),
    ]
)
DESCRIPTIONS = {
    "input": "Prompt tokens",
    "cached_input": "Prompt tokens from the prefix cache",
    "output": "Answer tokens",
    "prefix_cache": "Saved by the prefix cache",
    "duplicate": "Rows answered by an equal row of their run",
    "reused": "Rows answered by a stored answer",
    "resumed": "Rows that an earlier attempt had answered",
    "swiftkv": "Saved by layers that SwiftKV skips",
    "lost": "Work of a stopped attempt, not billed",
    "idle": "Idle device time of an engine",
    "aborted": "Device time of rows that were given up",
}


def export(store: Store, path: Path, since: float = 0.0, tenant: str | None = None, until: float | None = None) -> int:
    """Write the charges of a time span to a .parquet or .csv file, as `charges` takes it. Returns their number.

    Raises:
        InputError: The file's name has another suffix, or the file cannot be written.
        InvalidOptionError: An end of the time span is within an hour whose lines are deleted.
    """
    if path.suffix not in (".parquet", ".csv"):
        raise InputError(f"The file {str(path)!r} must end in .parquet or .csv.")
    table = charges(store, since, tenant, until)
    try:
        if path.suffix == ".csv":
            pyarrow.csv.write_csv(table, path)
        else:
            parquet.write_table(table, path)
    except OSError as error:
        raise InputError(f"The file {str(path)!r} cannot be written: {error}.") from error
    return int(table.num_rows)


def charges(store: Store, since: float = 0.0, tenant: str | None = None, until: float | None = None) -> pa.Table:
    """[n] rows of SCHEMA in the order of hours.

    Args:
        since: seconds of the epoch.
        tenant: None takes all tenants.
        until: charges before this time; None takes all from `since` on.

    Raises:
        InvalidOptionError: An end of the time span is within an hour whose lines are deleted.
    """
    span = TimeSpan(since, until)
    c = span.lines(tenant).c
    sqlite = store.engine.dialect.name == "sqlite"  # a cast to integer truncates in SQLite and rounds in PostgreSQL
    hour = (sa.cast(c.at / HOUR, sa.Integer) if sqlite else sa.func.floor(c.at / HOUR)) * HOUR
    split = [hour.label("hour"), c.tenant, c.user, c.job, c.query_tag, c.model, c.price_class, c.currency, c.basis]
    sums = [summed(c[name]).label(name) for name in SUMMED]
    with store.read() as connection:
        rows = connection.execute(sa.select(*split, *sums).group_by(*split).order_by(*split)).all()
        span.refuse_deleted(connection)
    return pa.Table.from_pylist([charge(row) for row in rows], SCHEMA)


def charge(row: Any) -> dict[str, Any]:
    start = datetime.fromtimestamp(int(row.hour), UTC)
    month = start.replace(day=1, hour=0)
    cost, tokens = money(int(row.cost_nano)), Decimal(int(row.tokens))
    tags = {"user": row.user, "job": row.job, "query_tag": row.query_tag}
    return {
        **dict.fromkeys(("ProviderName", "PublisherName", "InvoiceIssuerName", "BillingAccountId"), "complete-fn"),
        **dict.fromkeys(("SubAccountId", "SubAccountName"), row.tenant),
        "BillingPeriodStart": month,
        "BillingPeriodEnd": month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1),
        "ChargePeriodStart": start,
        "ChargePeriodEnd": datetime.fromtimestamp(int(row.hour) + HOUR, UTC),
        "ChargeCategory": "Usage",
        "ChargeDescription": DESCRIPTIONS.get(row.price_class, row.price_class),
        "ChargeFrequency": "Usage-Based",
        "BillingCurrency": row.currency,
        **dict.fromkeys(("BilledCost", "EffectiveCost", "ContractedCost", "ListCost"), cost),
        "ConsumedQuantity": tokens,
        "ConsumedUnit": "Tokens",
        "PricingQuantity": tokens / 1_000_000,
        "PricingUnit": "1000000 Tokens",
        "PricingCategory": "Standard",
        "ServiceName": "COMPLETE",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceSubcategory": "Generative AI",
        **dict.fromkeys(("ResourceId", "ResourceName"), row.model),
        "SkuId": f"{row.model}/{row.price_class}",
        "SkuMeter": row.price_class,
        "Tags": json.dumps({name: value for name, value in tags.items() if value is not None}),
        "x_Rows": int(row.rows),
        "x_SavedCost": money(int(row.saved_nano)),
        "x_DeviceSeconds": int(row.device_us) / 1e6,
        "x_SavedDeviceSeconds": int(row.saved_us) / 1e6,
        "x_PriceBasis": row.basis,
    }
