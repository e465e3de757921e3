-- complete() in Redshift, as Lambda UDFs. Placeholders, each in <...>:
--   <role_arn>  a role that the cluster has and that may invoke the Lambda functions
-- The Lambda functions are deploy/redshift/forwarder.py, made twice: complete-fn with COMPLETE_FN_FUNCTION=complete,
-- complete-fn-details with complete_details. STABLE lets Redshift call once for equal arguments; in WHERE it may call
-- for every row, so filter first in a subquery.
CREATE OR REPLACE EXTERNAL FUNCTION f_complete(VARCHAR(256), VARCHAR(65535)) RETURNS VARCHAR(65535)
  STABLE
  LAMBDA 'complete-fn' IAM_ROLE '<role_arn>' RETRY_TIMEOUT 60000 MAX_BATCH_ROWS 256 MAX_BATCH_SIZE 4 MB;

CREATE OR REPLACE EXTERNAL FUNCTION f_complete(VARCHAR(256), VARCHAR(65535), VARCHAR(65535)) RETURNS VARCHAR(65535)
  STABLE
  LAMBDA 'complete-fn' IAM_ROLE '<role_arn>' RETRY_TIMEOUT 60000 MAX_BATCH_ROWS 256 MAX_BATCH_SIZE 4 MB;

-- JSON text: JSON_EXTRACT_PATH_TEXT(f_complete_details(...), 'error', 'code')
CREATE OR REPLACE EXTERNAL FUNCTION f_complete_details(VARCHAR(256), VARCHAR(65535)) RETURNS VARCHAR(65535)
  STABLE
  LAMBDA 'complete-fn-details' IAM_ROLE '<role_arn>' RETRY_TIMEOUT 60000 MAX_BATCH_ROWS 256 MAX_BATCH_SIZE 4 MB;
