-- Sections of packages, in PostgreSQL: a row at a time, and the whole query at once.
SELECT package, complete('demo-llama-swiftkv', 'Name the section: ' || description) AS section FROM packages LIMIT 3;

SELECT "row" ->> 'package' AS package, completion, error ->> 'code' AS error
FROM complete_table($$SELECT package, 'Name the section: ' || description AS prompt FROM packages$$, 'demo-llama-swiftkv');

-- Submit, leave, and come back with the job's name for the rows that are done so far.
SELECT complete_submit('SELECT * FROM packages', 'demo-llama-swiftkv', 'Name the section: {description}') AS job;
