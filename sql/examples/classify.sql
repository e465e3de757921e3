-- One answer per row. Equal prompts are computed once, and a second run computes nothing.
SELECT package, section AS maintainers_own, complete('demo-llama-swiftkv', 'Name the section: ' || description) AS answer
FROM 'sql/examples/packages.parquet'
ORDER BY package
LIMIT 10;
