-- complete() in BigQuery, as remote functions. Placeholders, each in <...>:
--   <project>, <dataset>, <region>   where the functions are     <connection>  a CLOUD_RESOURCE connection, whose
--   <run_url>  https://....run.app of a Cloud Run service        service account may invoke the Cloud Run service
-- BigQuery calls Cloud Run only, with a token of its own in `Authorization`: deploy/bigquery/forwarder.py runs there
-- and passes requests on with the API key from Secret Manager. A request is cut at about 256 KiB; the service merges
-- requests that arrive together. Put conditions into WHERE: in CASE and IF BigQuery sends one row a request.
CREATE OR REPLACE FUNCTION `<project>.<dataset>`.complete(model STRING, prompt STRING)
  RETURNS STRING
  REMOTE WITH CONNECTION `<project>.<region>.<connection>`
  OPTIONS (endpoint = '<run_url>/v1/dialects/bigquery/complete', max_batching_rows = 256);

CREATE OR REPLACE FUNCTION `<project>.<dataset>`.complete_with(model STRING, prompt STRING, options JSON)
  RETURNS STRING
  REMOTE WITH CONNECTION `<project>.<region>.<connection>`
  OPTIONS (endpoint = '<run_url>/v1/dialects/bigquery/complete', max_batching_rows = 256);

-- JSON text: PARSE_JSON(complete_details(...)).error.code
CREATE OR REPLACE FUNCTION `<project>.<dataset>`.complete_details(model STRING, prompt STRING)
  RETURNS STRING
  REMOTE WITH CONNECTION `<project>.<region>.<connection>`
  OPTIONS (endpoint = '<run_url>/v1/dialects/bigquery/complete_details', max_batching_rows = 256);
