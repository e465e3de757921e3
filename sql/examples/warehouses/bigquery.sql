-- Sections of packages, in BigQuery. The condition is in WHERE, so that many rows travel in one request.
SELECT package, mydata.complete('demo-llama-swiftkv', CONCAT('Name the section: ', description)) AS section
FROM mydata.packages
WHERE size > 1000;

SELECT package, JSON_VALUE(d, '$.value') AS section, JSON_VALUE(d, '$.error.code') AS error
FROM (
  SELECT package, mydata.complete_details('demo-llama-swiftkv', CONCAT('Name the section: ', description)) AS d
  FROM mydata.packages
) AS t;
