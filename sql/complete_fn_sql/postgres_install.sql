-- complete() and its like for PostgreSQL 15, answered by a complete-fn service. Once per database, by a superuser:
--
--   COMPLETE_FN_URL=http://127.0.0.1:8000 COMPLETE_FN_KEY=cfn-... psql -d DATABASE -f postgres_install.sql
--   GRANT complete_fn_user TO alice;
--
-- COMPLETE_FN_KEY is not needed where the service has no keys. `-v schema=NAME` puts the functions elsewhere than into
-- public. Needs the language plpython3u (Debian: postgresql-plpython3-15). Run it again to change anything.
--
-- Who may do what:
--   complete_fn_owner  (no login) owns everything here and has no other rights. It alone reads URL and key.
--   complete_fn_user   (no login) may call the functions; grant it. PUBLIC may not.
-- One function, complete_fn.ask, is in an untrusted language; only complete_fn_owner may call it, so a user reaches the
-- routes that the functions below use and no other. complete_table and complete_submit run the caller's query with the
-- caller's own rights. A job is seen by the role that submitted it and by that role's members.
\set ON_ERROR_STOP on
\getenv url COMPLETE_FN_URL
\getenv key COMPLETE_FN_KEY
\if :{?schema}
\else
  \set schema public
\endif
\if :{?url}
\else
  DO $$ BEGIN
      RAISE EXCEPTION 'COMPLETE_FN_URL is not set: give the address of the service, and COMPLETE_FN_KEY if it has keys.';
  END $$;
\endif
\if :{?key}
\else
  \set key ''
\endif

BEGIN;
SET LOCAL log_statement = 'none';  -- the key stays out of the server's log
SET LOCAL log_min_duration_statement = -1;
SET LOCAL log_min_error_statement = 'panic';
SET LOCAL client_min_messages = 'warning';

CREATE EXTENSION IF NOT EXISTS plpython3u;

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['complete_fn_owner', 'complete_fn_user'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', name);
        END IF;
    END LOOP;
END $$;

CREATE SCHEMA IF NOT EXISTS complete_fn AUTHORIZATION complete_fn_owner;
GRANT USAGE ON SCHEMA complete_fn TO complete_fn_user;

CREATE TABLE IF NOT EXISTS complete_fn.service (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    url text NOT NULL CHECK (url ~ '^https?://[^/]+'),
    key text NOT NULL
);
CREATE TABLE IF NOT EXISTS complete_fn.jobs (job text PRIMARY KEY, owner name NOT NULL, submitted timestamptz NOT NULL);
INSERT INTO complete_fn.service (url, key) VALUES (:'url', :'key')
    ON CONFLICT (one) DO UPDATE SET url = excluded.url, key = excluded.key;

-- One request to the service; a batch of rows is asked for until it is done, and stopped if the statement is cancelled.
-- It never raises what the service refuses: `status` is 0 if nobody answers.
CREATE OR REPLACE FUNCTION complete_fn.ask(
    method text, path text, body text, OUT status integer, OUT content text, OUT message text, OUT code text
) LANGUAGE plpython3u SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $py$
import http.client
import json
import re
import time
import urllib.parse
import uuid

PAUSES = {429: [1, 2, 4, 8, 16], 503: [2], 0: [1]}
service = plpy.execute("SELECT url, key FROM complete_fn.service")[0]
url = urllib.parse.urlsplit(service["url"])
prefix = url.path.rstrip("/").removesuffix("/v1")
kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
headers = {"Content-Type": "application/json"}
if service["key"]:
    headers["Authorization"] = "Bearer " + service["key"]
batch = path.startswith("/v1/dialects/")
if batch:
    headers["Complete-Batch-Id"] = str(uuid.uuid4())
raw = None if body is None else body.encode()
if path == "/v1/files":
    edge = uuid.uuid4().hex
    headers["Content-Type"] = "multipart/form-data; boundary=" + edge
    part = '--{}\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    raw = b"".join([
        part.format(edge, "purpose", "").encode(), b"user_data\r\n",
        part.format(edge, "file", '; filename="query.jsonl"').encode(), raw, "\r\n--{}--\r\n".format(edge).encode(),
    ])


def pause(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        plpy.execute("SELECT 1")  # here a cancelled statement ends
        time.sleep(0.1)


def request(verb):
    try:
        link.request(verb, prefix + path, raw if verb == method else None, headers)
        reply = link.getresponse()
        return reply.status, reply.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        link.close()
        return 0, "Nobody answers at {} ({}).".format(service["url"], error or type(error).__name__)


link = kind(url.hostname, url.port, timeout=60)
pauses = {status: list(seconds) for status, seconds in PAUSES.items()}
verb = method
try:
    while True:
        status, content = request(verb)
        plpy.execute("SELECT 1")
        if status == 202:
            verb = "GET"
        elif batch and status == 404 and verb == "GET":
            verb = method
        elif batch and pauses.get(status):
            pause(pauses[status].pop(0))
        else:
            break
except BaseException:
    if batch:
        link.close()
        link.timeout = 2
        request("DELETE")
    raise
finally:
    link.close()
if status and status < 400:
    if "\\u0000" in content:  # a character that neither text nor jsonb takes
        content = re.sub(r"(?<!\\)((?:\\\\)*)\\u0000", r"\1\\ufffd", content)
    return status, content, None, None
try:
    error = json.loads(content)["error"]
    return status, None, str(error["message"]), str(error["code"])
except (ValueError, KeyError, TypeError):
    return status, None, content[:500] if status == 0 else "The service answers {}.".format(status), None
$py$;

-- The content of the reply, or a clear error.
CREATE OR REPLACE FUNCTION complete_fn.call(method text, path text, body text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    reply record;
BEGIN
    SELECT * INTO reply FROM complete_fn.ask(method, path, body);
    IF reply.message IS NULL THEN
        RETURN reply.content;
    END IF;
    RAISE EXCEPTION USING
        MESSAGE = reply.message,
        ERRCODE = CASE
            WHEN reply.status = 0 THEN '08001'
            WHEN reply.status IN (401, 403) THEN '28000'
            WHEN reply.status = 413 THEN '54000'
            WHEN reply.status IN (402, 429) THEN '53400'
            WHEN reply.status >= 500 THEN '58000'
            ELSE '22023'
        END,
        HINT = CASE
            WHEN reply.status = 0 THEN 'Start it with `complete-fn serve`, or correct the URL in complete_fn.service.'
            WHEN reply.status IN (401, 403) THEN 'A superuser sets the API key: UPDATE complete_fn.service SET key = ...'
            WHEN reply.code = 'model_not_found' THEN '`complete-fn models` lists the models of the service.'
            WHEN reply.status = 413 THEN 'Ask with fewer or shorter rows.'
            WHEN reply.status >= 429 THEN 'Finished rows are kept: run the statement again in a moment.'
            ELSE 'Correct the arguments; nothing was run.'
        END;
END $$;

-- [n] values for n prompts, in requests of at most about 8 MB, which is below what the service takes.
CREATE OR REPLACE FUNCTION complete_fn.answers(function text, model text, prompts text[], options jsonb)
RETURNS SETOF jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    part text[];
    tag text := nullif(current_setting('complete_fn.query_tag', true), '');
BEGIN
    FOR part IN
        SELECT array_agg(s.prompt ORDER BY s.n)
        FROM (
            SELECT u.prompt, u.n, sum(400 + coalesce(octet_length(to_json(u.prompt)::text), 0)) OVER (ORDER BY u.n) AS size
            FROM unnest(prompts) WITH ORDINALITY AS u (prompt, n)
        ) AS s
        GROUP BY s.size / 8000000
        ORDER BY s.size / 8000000
    LOOP
        RETURN QUERY
            SELECT jsonb_array_elements(complete_fn.call('POST', '/v1/dialects/postgres/' || function,
                json_build_object('model', model, 'prompts', part, 'options', options, 'query_tag', tag)::text
            )::jsonb -> 'values');
    END LOOP;
END $$;

-- [n] details for n prompts.
CREATE OR REPLACE FUNCTION complete_fn.details(model text, prompts text[], options jsonb) RETURNS SETOF jsonb
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT nullif(a, 'null') FROM complete_fn.answers('complete_details', model, prompts, options) AS a;
$$;

-- A job over rows as JSON lines; it belongs to the role of the session.
CREATE OR REPLACE FUNCTION complete_fn.submit(lines text, model text, prompt text, options jsonb, max_cost numeric)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    file text := complete_fn.call('POST', '/v1/files', lines)::json ->> 'id';
    tag text := nullif(current_setting('complete_fn.query_tag', true), '');
    job text;
BEGIN
    job := complete_fn.call('POST', '/v1/jobs', json_build_object(
        'model', model, 'prompt', prompt, 'source', json_build_object('file_id', file),
        'options', coalesce(options, '{}'), 'max_cost', max_cost::text, 'query_tag', tag)::text)::json ->> 'id';
    PERFORM complete_fn.call('DELETE', '/v1/files/' || file);  -- the job has its own copy
    INSERT INTO complete_fn.jobs VALUES (job, session_user, now());
    RETURN job;
END $$;

-- The job's address, for those who may see it.
CREATE OR REPLACE FUNCTION complete_fn.path_of(job text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM complete_fn.jobs AS j
                   WHERE j.job = path_of.job AND pg_has_role(session_user, j.owner, 'MEMBER')) THEN
        RAISE EXCEPTION USING MESSAGE = format('There is no job %L of yours.', job), ERRCODE = '42704',
            HINT = 'complete_submit gives the name of a job. Its transaction must have been committed.';
    END IF;
    RETURN '/v1/jobs/' || job;
END $$;

SET LOCAL search_path = :"schema", pg_catalog, pg_temp;

-- The answer to one prompt; NULL if the prompt is NULL or its row failed. Its cost makes the planner test cheap
-- conditions first; it is volatile, so that nothing is completed while a statement is planned.
CREATE OR REPLACE FUNCTION complete(model text, prompt text, options jsonb DEFAULT NULL) RETURNS text
LANGUAGE plpgsql VOLATILE COST 10000 SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF model IS NULL OR prompt IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT a #>> '{}' FROM complete_fn.answers('complete', model, ARRAY[prompt], options) AS a);
END $$;

-- {value, error: {code, message}, finish_reason, usage, cost, source} of one prompt.
CREATE OR REPLACE FUNCTION complete_details(model text, prompt text, options jsonb DEFAULT NULL) RETURNS jsonb
LANGUAGE plpgsql VOLATILE COST 10000 SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF model IS NULL OR prompt IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT nullif(a, 'null') FROM complete_fn.answers('complete_details', model, ARRAY[prompt], options) AS a);
END $$;

-- [n] answers for n prompts, as one request.
CREATE OR REPLACE FUNCTION complete_many(model text, prompts text[], options jsonb DEFAULT NULL) RETURNS text[]
LANGUAGE sql VOLATILE COST 100000 SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN prompts IS NOT NULL AND model IS NOT NULL THEN coalesce(
        (SELECT array_agg(a.value #>> '{}' ORDER BY a.n)
         FROM complete_fn.answers('complete', model, prompts, options) WITH ORDINALITY AS a (value, n)),
        ARRAY[]::text[]) END;
$$;

-- Every row of a query that has a column `prompt`, with its answer: the engine gets 20,000 rows at a time. `row` has
-- the query's other columns; `error` is {code, message} where there is no answer.
CREATE OR REPLACE FUNCTION complete_table(query text, model text, options jsonb DEFAULT NULL)
RETURNS TABLE ("row" jsonb, completion text, error jsonb)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    source refcursor;
    one record;
    kept jsonb[];
    prompts text[];
BEGIN
    BEGIN
        OPEN source FOR EXECUTE
            format('SELECT to_jsonb(q) - ''prompt'' AS kept, q.prompt::text AS prompt FROM (%s) AS q', rtrim(query, E'; \n\t'));
    EXCEPTION WHEN undefined_column THEN
        RAISE EXCEPTION USING MESSAGE = SQLERRM, ERRCODE = '42703',
            HINT = 'The query needs a column named prompt: SELECT id, ''Summarise: '' || body AS prompt FROM docs';
    END;
    LOOP
        kept := ARRAY[]::jsonb[];
        prompts := ARRAY[]::text[];
        FOR i IN 1..20000 LOOP
            FETCH source INTO one;
            EXIT WHEN NOT FOUND;
            kept := array_append(kept, one.kept);
            prompts := array_append(prompts, one.prompt);
        END LOOP;
        EXIT WHEN cardinality(kept) = 0;
        RETURN QUERY
            SELECT k.kept, CASE WHEN a.value -> 'error' = 'null' THEN a.value ->> 'value' END, nullif(a.value -> 'error', 'null')
            FROM unnest(kept) WITH ORDINALITY AS k (kept, n)
            JOIN complete_fn.details(model, prompts, options) WITH ORDINALITY AS a (value, n) USING (n)
            ORDER BY n;
    END LOOP;
    CLOSE source;
END $$;

-- A job over every row of a query, which goes on after the session has ended; its name. `prompt` is a template over the
-- query's columns. The job runs whatever becomes of this transaction, but only a committed one remembers its name.
CREATE OR REPLACE FUNCTION complete_submit(
    query text, model text, prompt text, options jsonb DEFAULT NULL, max_cost numeric DEFAULT NULL
) RETURNS text LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    lines text;
BEGIN
    EXECUTE format('SELECT string_agg(row_to_json(q)::text, E''\n'') FROM (%s) AS q', rtrim(query, E'; \n\t')) INTO lines;
    IF lines IS NULL THEN
        RAISE EXCEPTION USING MESSAGE = 'The query has no rows, so there is nothing to submit.', ERRCODE = '02000';
    END IF;
    RETURN complete_fn.submit(lines, model, prompt, options, max_cost);
END $$;

-- The rows of a job that are done so far: their columns, the answer, and everything about it.
CREATE OR REPLACE FUNCTION complete_result(job text) RETURNS TABLE ("row" jsonb, completion text, details jsonb)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT l.line - 'completion' - 'completion_details', l.line ->> 'completion', l.line -> 'completion_details'
    FROM (SELECT s::jsonb AS line FROM string_to_table(
        complete_fn.call('GET', complete_fn.path_of(job) || '/results?format=jsonl&details=true&partial=true'), E'\n'
    ) AS s WHERE s <> '') AS l;
$$;

CREATE OR REPLACE FUNCTION complete_progress(
    job text, OUT status text, OUT rows bigint, OUT done bigint, OUT failed bigint, OUT cost numeric, OUT currency text,
    OUT eta_seconds numeric, OUT error text
) LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT s ->> 'status', (s #>> '{rows,total}')::bigint, (s #>> '{rows,done}')::bigint, (s #>> '{rows,failed}')::bigint,
        (s #>> '{cost,amount}')::numeric, s #>> '{cost,currency}', (s ->> 'eta_seconds')::numeric, s ->> 'error'
    FROM (SELECT complete_fn.call('GET', complete_fn.path_of(job))::json AS s) AS j;
$$;

-- Stop a job; what is done of it stays. Its status.
CREATE OR REPLACE FUNCTION complete_cancel(job text) RETURNS text
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT complete_fn.call('POST', complete_fn.path_of(job) || '/cancel')::json ->> 'status';
$$;

-- What the service's tenant has used, with the names of Snowflake's usage views; for the owner of the database to grant.
CREATE OR REPLACE FUNCTION complete_usage() RETURNS TABLE (
    usage_time date, model_name text, query_tag text, user_name text, tokens bigint, tokens_granular jsonb,
    token_credits numeric, currency text
) LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT (u ->> 'day')::date, u ->> 'model', nullif(u ->> 'query_tag', '-'), u ->> 'user',
        (u ->> 'input_tokens')::bigint + (u ->> 'output_tokens')::bigint,
        jsonb_build_object('input', u -> 'input_tokens', 'cached_input', u -> 'cached_tokens', 'output', u -> 'output_tokens'),
        (u ->> 'cost')::numeric, u ->> 'currency'
    FROM json_array_elements(complete_fn.call('GET', '/v1/usage?by=day,model,query_tag,user')::json -> 'data') AS u;
$$;

-- All of it belongs to complete_fn_owner; users may call what is for them, PUBLIC nothing.
DO $$
DECLARE
    one record;
    mine text[] := ARRAY['complete', 'complete_details', 'complete_many', 'complete_table', 'complete_submit',
        'complete_result', 'complete_progress', 'complete_cancel', 'complete_usage'];
BEGIN
    FOR one IN
        SELECT p.oid::regprocedure AS signature, p.proname, n.nspname
        FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE n.nspname = 'complete_fn' OR (n.nspname = current_schema() AND p.proname = ANY (mine))
    LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO complete_fn_owner', one.signature);
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', one.signature);
        IF one.proname IN ('details', 'submit') OR (one.nspname <> 'complete_fn' AND one.proname <> 'complete_usage') THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO complete_fn_user', one.signature);
        END IF;
    END LOOP;
    ALTER TABLE complete_fn.service OWNER TO complete_fn_owner;
    ALTER TABLE complete_fn.jobs OWNER TO complete_fn_owner;
    REVOKE ALL ON complete_fn.service, complete_fn.jobs FROM PUBLIC;
END $$;
COMMIT;
