-- complete() in Snowflake, as external functions. Placeholders, each in <...>:
--   <aws_role_arn>  the role that may call the API gateway        <gateway_url>  https://....amazonaws.com/prod
-- The gateway passes requests on to <service>/v1/dialects/snowflake/..., with all sf-external-function-* headers, and
-- adds `Authorization: Bearer <api key>` from its own secrets: in HEADERS of a function, whoever may describe the
-- function would read the key. Inside Snowpark Container Services write SERVICE = and ENDPOINT = in place of both.
-- A batch must be done within 600 s: MAX_BATCH_ROWS keeps it well inside. IMMUTABLE lets Snowflake send a row once.
CREATE OR REPLACE API INTEGRATION complete_fn
  API_PROVIDER = aws_api_gateway
  API_AWS_ROLE_ARN = '<aws_role_arn>'
  API_ALLOWED_PREFIXES = ('<gateway_url>/')
  ENABLED = TRUE;

CREATE OR REPLACE EXTERNAL FUNCTION complete(model VARCHAR, prompt VARCHAR)
  RETURNS VARCHAR
  IMMUTABLE
  API_INTEGRATION = complete_fn
  MAX_BATCH_ROWS = 256
  COMPRESSION = GZIP
  AS '<gateway_url>/v1/dialects/snowflake/complete';

CREATE OR REPLACE EXTERNAL FUNCTION complete(model VARCHAR, prompt VARCHAR, options OBJECT)
  RETURNS VARCHAR
  IMMUTABLE
  API_INTEGRATION = complete_fn
  MAX_BATCH_ROWS = 256
  COMPRESSION = GZIP
  AS '<gateway_url>/v1/dialects/snowflake/complete';

CREATE OR REPLACE EXTERNAL FUNCTION complete_details(model VARCHAR, prompt VARCHAR)
  RETURNS VARIANT
  IMMUTABLE
  API_INTEGRATION = complete_fn
  MAX_BATCH_ROWS = 256
  COMPRESSION = GZIP
  AS '<gateway_url>/v1/dialects/snowflake/complete_details';
