-- Sections of packages, in Redshift; the filter is a subquery, so that it comes first.
SELECT package, f_complete('demo-llama-swiftkv', 'Name the section: ' || description) AS section
FROM (SELECT package, description FROM packages WHERE size > 1000) AS t;

SELECT package, JSON_EXTRACT_PATH_TEXT(d, 'value') AS section, JSON_EXTRACT_PATH_TEXT(d, 'error', 'code') AS error
FROM (SELECT package, f_complete_details('demo-llama-swiftkv', 'Name the section: ' || description) AS d FROM packages) AS t;
