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
-- Others may create objects in the schema: no name is looked up in it, all but complete_fn.ask is made with the rights
-- of complete_fn_owner alone, and functions of others stay as they are.
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
SET LOCAL search_path = pg_catalog, pg_temp;
SET LOCAL complete_fn.schema = :'schema';
SET LOCAL complete_fn.functions = '{"complete(text,text,jsonb)", "complete_details(text,text,jsonb)",
    "complete_many(text,text[],jsonb)", "complete_table(text,text,jsonb)", "complete_result(text)",
    "complete_submit(text,text,text,jsonb,numeric)", "complete_progress(text)", "complete_cancel(text)",
    "complete_usage()"}';

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

-- What is there already is ours or stays as it is.
DO $$
DECLARE
    target text := current_setting('complete_fn.schema');
    taken text;
BEGIN
    IF target = 'complete_fn' THEN
        RAISE EXCEPTION USING MESSAGE = 'The schema complete_fn is for the parts that nobody calls.',
            HINT = 'Give another one: psql -v schema=NAME.';
    END IF;
    SELECT format('The schema complete_fn belongs to %I', pg_get_userbyid(nspowner)) INTO taken
    FROM pg_namespace WHERE nspname = 'complete_fn' AND nspowner <> 'complete_fn_owner'::regrole;
    IF taken IS NULL THEN
        SELECT format('The function %s belongs to %I', p.oid::regprocedure, pg_get_userbyid(p.proowner)) INTO taken
        FROM unnest(current_setting('complete_fn.functions')::text[]) AS f
        JOIN pg_proc AS p ON p.oid = to_regprocedure(format('%I.%s', target, f))
        WHERE p.proowner <> 'complete_fn_owner'::regrole;
    END IF;
    IF taken IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = taken || ', so nothing was installed.',
            HINT = 'Rename or drop it. Functions may also go into another schema: psql -v schema=NAME.';
    END IF;
END $$;
GRANT USAGE ON SCHEMA complete_fn TO complete_fn_user;

-- One request to the service; a batch of rows is asked for until it is done, and stopped if the statement is cancelled.
-- It never raises what the service refuses: `status` is 0 if nobody answers. A job is then submitted once more: its
-- idempotency key makes that the same job.
CREATE OR REPLACE FUNCTION complete_fn.ask(
    method text, path text, body text, OUT status integer, OUT content text, OUT message text, OUT code text
) LANGUAGE plpython3u SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $py$
import http.client
import json
import re
import select
import time
import urllib.parse
import uuid

service = plpy.execute("SELECT url, key FROM complete_fn.service")[0]
url = urllib.parse.urlsplit(service["url"])
prefix = url.path.rstrip("/").removesuffix("/v1")
kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
headers = {"Content-Type": "application/json"}
if service["key"]:
    headers["Authorization"] = "Bearer " + service["key"]
batch = path.startswith("/v1/dialects/")
pauses, patience = {}, 600  # tables take their time
if batch:
    pauses, patience = {429: [1, 2, 4, 8, 16], 503: [2], 0: [1]}, 60
    headers["Complete-Batch-Id"] = str(uuid.uuid4())
elif (method, path) == ("POST", "/v1/jobs"):
    pauses = {0: [1]}
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
        ready, until = select.poll(), time.monotonic() + patience
        ready.register(link.sock, select.POLLIN)
        while not ready.poll(100):
            plpy.execute("SELECT 1")  # here too
            if time.monotonic() > until:
                raise TimeoutError("no answer in {} seconds".format(patience))
        link.sock.settimeout(patience)  # TLS may have sent a ticket only: then a cancel waits for the reply
        reply = link.getresponse()
        return reply.status, reply.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        link.close()
        return 0, "Nobody answers at {} ({}).".format(service["url"], error or type(error).__name__)


link = kind(url.hostname, url.port, timeout=60)
verb = method
try:
    while True:
        status, content = request(verb)
        plpy.execute("SELECT 1")
        if status == 202:
            verb = "GET"
        elif batch and status == 404 and verb == "GET":
            verb = method
        elif pauses.get(status):
            pause(pauses[status].pop(0))
        else:
            break
except BaseException:
    if batch:
        link.close()
        link.timeout = patience = 2
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
ALTER FUNCTION complete_fn.ask(text, text, text) OWNER TO complete_fn_owner;

-- From here on without a superuser's rights: an object of somebody else cannot be replaced.
GRANT CREATE, USAGE ON SCHEMA :"schema" TO complete_fn_owner;
SET LOCAL ROLE complete_fn_owner;

CREATE TABLE IF NOT EXISTS complete_fn.service (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    url text NOT NULL CHECK (url ~ '^https?://[^/]+'),
    key text NOT NULL
);
CREATE TABLE IF NOT EXISTS complete_fn.jobs (job text PRIMARY KEY, owner name NOT NULL, submitted timestamptz NOT NULL);
INSERT INTO complete_fn.service (url, key) VALUES (:'url', :'key')
    ON CONFLICT (one) DO UPDATE SET url = excluded.url, key = excluded.key;

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
            WHEN reply.status = 0 AND method = 'POST' AND path = '/v1/jobs' THEN
                'The service may have the job: look with `complete-fn jobs list` before you submit it again.'
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
    BEGIN
        job := complete_fn.call('POST', '/v1/jobs', json_build_object(
            'model', model, 'prompt', prompt, 'source', json_build_object('file_id', file),
            'options', coalesce(options, '{}'), 'max_cost', max_cost::text, 'query_tag', tag,
            'idempotency_key', gen_random_uuid())::text)::json ->> 'id';
    EXCEPTION WHEN OTHERS OR query_canceled THEN
        PERFORM complete_fn.ask('DELETE', '/v1/files/' || file, NULL);
        RAISE;
    END;
    PERFORM complete_fn.ask('DELETE', '/v1/files/' || file, NULL);  -- the job has its own copy
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

-- The answer to one prompt; NULL if the prompt is NULL or its row failed. Its cost makes the planner test cheap
-- conditions first; it is volatile, so that nothing is completed while a statement is planned.
CREATE OR REPLACE FUNCTION :"schema".complete(model text, prompt text, options jsonb DEFAULT NULL) RETURNS text
LANGUAGE plpgsql VOLATILE COST 10000 SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF model IS NULL OR prompt IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT a #>> '{}' FROM complete_fn.answers('complete', model, ARRAY[prompt], options) AS a);
END $$;

-- {value, error: {code, message}, finish_reason, usage, cost, source} of one prompt.
CREATE OR REPLACE FUNCTION :"schema".complete_details(model text, prompt text, options jsonb DEFAULT NULL) RETURNS jsonb
LANGUAGE plpgsql VOLATILE COST 10000 SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF model IS NULL OR prompt IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT nullif(a, 'null') FROM complete_fn.answers('complete_details', model, ARRAY[prompt], options) AS a);
END $$;

-- [n] answers for n prompts, as one request.
CREATE OR REPLACE FUNCTION :"schema".complete_many(model text, prompts text[], options jsonb DEFAULT NULL)
RETURNS text[] LANGUAGE sql VOLATILE COST 100000 SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN prompts IS NOT NULL AND model IS NOT NULL THEN coalesce(
        (SELECT array_agg(a.value #>> '{}' ORDER BY a.n)
         FROM complete_fn.answers('complete', model, prompts, options) WITH ORDINALITY AS a (value, n)),
        ARRAY[]::text[]) END;
$$;

-- Every row of a query that has a column `prompt`, with its answer: the engine gets 20,000 rows at a time. `row` has
-- the query's other columns; `error` is {code, message} where there is no answer. Names are looked up on the caller's
-- path here and in complete_submit, so they are qualified and literals typed: no better match elsewhere is taken.
CREATE OR REPLACE FUNCTION :"schema".complete_table(query text, model text, options jsonb DEFAULT NULL)
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
            pg_catalog.format(
                'SELECT pg_catalog.to_jsonb(q) - ''prompt''::text AS kept, q.prompt::text AS prompt FROM (%s) AS q',
                pg_catalog.rtrim(query, E'; \n\t'));
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
            kept := pg_catalog.array_append(kept, one.kept);
            prompts := pg_catalog.array_append(prompts, one.prompt);
        END LOOP;
        EXIT WHEN pg_catalog.cardinality(kept) = 0;
        RETURN QUERY
            SELECT k.kept, CASE WHEN a.value -> 'error'::text = 'null'::jsonb THEN a.value ->> 'value'::text END,
                nullif(a.value -> 'error'::text, 'null'::jsonb)
            FROM pg_catalog.unnest(kept) WITH ORDINALITY AS k (kept, n)
            JOIN complete_fn.details(model, prompts, options) WITH ORDINALITY AS a (value, n) USING (n)
            ORDER BY n;
    END LOOP;
    CLOSE source;
END $$;

-- A job over every row of a query, which goes on after the session has ended; its name. `prompt` is a template over the
-- query's columns. The job runs whatever becomes of this transaction, but only a committed one remembers its name.
CREATE OR REPLACE FUNCTION :"schema".complete_submit(
    query text, model text, prompt text, options jsonb DEFAULT NULL, max_cost numeric DEFAULT NULL
) RETURNS text LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    lines text;
BEGIN
    EXECUTE pg_catalog.format(
        'SELECT pg_catalog.string_agg(pg_catalog.row_to_json(q)::text, E''\n''::text) FROM (%s) AS q',
        pg_catalog.rtrim(query, E'; \n\t')) INTO lines;
    IF lines IS NULL THEN
        RAISE EXCEPTION USING MESSAGE = 'The query has no rows, so there is nothing to submit.', ERRCODE = '02000';
    END IF;
    RETURN complete_fn.submit(lines, model, prompt, options, max_cost);
END $$;

-- The rows of a job that are done so far: their columns, the answer, and everything about it.
CREATE OR REPLACE FUNCTION :"schema".complete_result(job text)
RETURNS TABLE ("row" jsonb, completion text, details jsonb)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT l.line - 'completion' - 'completion_details', l.line ->> 'completion', l.line -> 'completion_details'
    FROM (SELECT s::jsonb AS line FROM string_to_table(
        complete_fn.call('GET', complete_fn.path_of(job) || '/results?format=jsonl&details=true&partial=true'), E'\n'
    ) AS s WHERE s <> '') AS l;
$$;

CREATE OR REPLACE FUNCTION :"schema".complete_progress(
    job text, OUT status text, OUT rows bigint, OUT done bigint, OUT failed bigint, OUT cost numeric, OUT currency text,
    OUT eta_seconds numeric, OUT error text
) LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT s ->> 'status', (s #>> '{rows,total}')::bigint, (s #>> '{rows,done}')::bigint, (s #>> '{rows,failed}')::bigint,
        (s #>> '{cost,amount}')::numeric, s #>> '{cost,currency}', (s ->> 'eta_seconds')::numeric, s ->> 'error'
    FROM (SELECT complete_fn.call('GET', complete_fn.path_of(job))::json AS s) AS j;
$$;

-- Stop a job; what is done of it stays. Its status.
CREATE OR REPLACE FUNCTION :"schema".complete_cancel(job text) RETURNS text
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT complete_fn.call('POST', complete_fn.path_of(job) || '/cancel')::json ->> 'status';
$$;

-- What the service's tenant has used, with the names of Snowflake's usage views; for the owner of the database to grant.
CREATE OR REPLACE FUNCTION :"schema".complete_usage() RETURNS TABLE (
    usage_time date, model_name text, query_tag text, user_name text, tokens bigint, tokens_granular jsonb,
    token_credits numeric, currency text
) LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT (u ->> 'day')::date, u ->> 'model', nullif(u ->> 'query_tag', '-'), u ->> 'user',
        (u ->> 'input_tokens')::bigint + (u ->> 'output_tokens')::bigint,
        jsonb_build_object('input', u -> 'input_tokens', 'cached_input', u -> 'cached_tokens', 'output', u -> 'output_tokens'),
        (u ->> 'cost')::numeric, u ->> 'currency'
    FROM json_array_elements(complete_fn.call('GET', '/v1/usage?by=day,model,query_tag,user')::json -> 'data') AS u;
$$;

-- Users may call what is for them, PUBLIC nothing.
DO $$
DECLARE
    signature text;
BEGIN
    FOREACH signature IN ARRAY current_setting('complete_fn.functions')::text[] LOOP
        signature := format('%I.%s', current_setting('complete_fn.schema'), signature)::regprocedure;
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', signature);
        IF signature NOT LIKE '%.complete_usage()' THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO complete_fn_user', signature);
        END IF;
    END LOOP;
END $$;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA complete_fn FROM PUBLIC;
GRANT EXECUTE ON FUNCTION complete_fn.details(text, text[], jsonb), complete_fn.submit(text, text, text, jsonb, numeric)
    TO complete_fn_user;
REVOKE ALL ON complete_fn.service, complete_fn.jobs FROM PUBLIC;
SET LOCAL ROLE NONE;
REVOKE CREATE, USAGE ON SCHEMA :"schema" FROM complete_fn_owner;
COMMIT;
