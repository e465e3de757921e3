-- The ledger with the names and columns of Cortex's usage history, for SQLite. Only views: run it again at any time.
-- TOKEN_CREDITS and CREDITS are money of the column CURRENCY; WAREHOUSE_ID is NULL (there is none); QUERY_ID is the job,
-- or the number of a run outside of jobs; the last columns are ours. Times are UTC, and lines are there in seconds.
-- With COMPLETE_FN_LEDGER_DAYS only lines of the last days are here: SELECT at FROM upkeep WHERE name = 'ledger lines'
-- gives the second of the epoch from which on all are.

DROP VIEW IF EXISTS cortex_functions_usage_history;
DROP VIEW IF EXISTS cortex_functions_query_usage_history;
DROP VIEW IF EXISTS cortex_aisql_usage_history;
DROP VIEW IF EXISTS cortex_ai_functions_usage_history;
DROP VIEW IF EXISTS complete_fn_ledger;

CREATE VIEW complete_fn_ledger AS
SELECT
    strftime('%Y-%m-%d %H:00:00', at, 'unixepoch') AS start_time,
    strftime('%Y-%m-%d %H:00:00', at + 3600, 'unixepoch') AS end_time,
    'COMPLETE' AS function_name,
    model AS model_name,
    CAST(NULL AS TEXT) AS warehouse_id,
    coalesce(job, CAST(attempt AS TEXT)) AS query_id,
    query_tag,
    "user" AS user_id,
    tenant,
    currency,
    CASE WHEN price_class = 'cached_input' THEN 'cache_read_input' ELSE price_class END AS token_class,
    tokens,
    cost_nano / 1e9 AS credits,
    (device_us / 1e6) AS device_seconds
FROM ledger
WHERE price_class IN ('input', 'cached_input', 'output');

CREATE VIEW cortex_functions_usage_history AS
SELECT
    start_time,
    end_time,
    function_name,
    model_name,
    warehouse_id,
    sum(credits) AS token_credits,
    sum(tokens) AS tokens,
    tenant,
    currency,
    sum(device_seconds) AS device_seconds
FROM complete_fn_ledger
GROUP BY start_time, end_time, function_name, model_name, warehouse_id, tenant, currency;

CREATE VIEW cortex_functions_query_usage_history AS
SELECT
    query_id,
    warehouse_id,
    model_name,
    function_name,
    sum(tokens) AS tokens,
    sum(credits) AS token_credits,
    tenant,
    currency,
    sum(device_seconds) AS device_seconds
FROM complete_fn_ledger
GROUP BY query_id, warehouse_id, model_name, function_name, tenant, currency;

CREATE VIEW cortex_aisql_usage_history AS
SELECT
    start_time AS usage_time,
    function_name,
    model_name,
    query_id,
    query_tag,
    user_id,
    warehouse_id,
    sum(tokens) AS tokens,
    sum(credits) AS token_credits,
    json_object(
        'input', sum(CASE token_class WHEN 'input' THEN tokens ELSE 0 END),
        'cache_read_input', sum(CASE token_class WHEN 'cache_read_input' THEN tokens ELSE 0 END),
        'output', sum(CASE token_class WHEN 'output' THEN tokens ELSE 0 END)
    ) AS tokens_granular,
    json_object(
        'input', sum(CASE token_class WHEN 'input' THEN credits ELSE 0 END),
        'cache_read_input', sum(CASE token_class WHEN 'cache_read_input' THEN credits ELSE 0 END),
        'output', sum(CASE token_class WHEN 'output' THEN credits ELSE 0 END)
    ) AS token_credits_granular,
    tenant,
    currency,
    sum(device_seconds) AS device_seconds
FROM complete_fn_ledger
GROUP BY start_time, function_name, model_name, query_id, query_tag, user_id, warehouse_id, tenant, currency;

CREATE VIEW cortex_ai_functions_usage_history AS
SELECT
    start_time,
    end_time,
    function_name,
    model_name,
    query_id,
    warehouse_id,
    query_tag,
    user_id,
    json_array(
        json_object(
            'key', json_object('metric', 'input', 'unit', 'tokens'),
            'value', sum(CASE token_class WHEN 'input' THEN tokens ELSE 0 END)
        ),
        json_object(
            'key', json_object('metric', 'cache_read_input', 'unit', 'tokens'),
            'value', sum(CASE token_class WHEN 'cache_read_input' THEN tokens ELSE 0 END)
        ),
        json_object(
            'key', json_object('metric', 'output', 'unit', 'tokens'),
            'value', sum(CASE token_class WHEN 'output' THEN tokens ELSE 0 END)
        )
    ) AS metrics,
    sum(credits) AS credits,
    NOT EXISTS (
        SELECT 1 FROM jobs AS j
        WHERE j.tenant = l.tenant AND j.id = l.query_id AND j.status IN ('queued', 'running', 'stopping')
    ) AND NOT EXISTS (
        SELECT 1 FROM attempts AS a
        WHERE a.tenant = l.tenant AND coalesce(a.job, CAST(a.id AS TEXT)) = l.query_id AND a.status = 'running'
    ) AS is_completed,
    tenant,
    currency,
    sum(device_seconds) AS device_seconds
FROM complete_fn_ledger AS l
GROUP BY start_time, end_time, function_name, model_name, query_id, warehouse_id, query_tag, user_id, tenant, currency;
