-- Answers are values: filter, group and join them. CASE keeps the cheap condition before the costly one.
WITH asked AS (
    SELECT maintainer, CASE WHEN length(description) < 2000
                            THEN complete('demo-llama-swiftkv', 'Name the section: ' || description) END AS answer
    FROM (FROM 'sql/examples/packages.parquet' ORDER BY package LIMIT 30)
)
SELECT answer, count(*) AS packages, count(DISTINCT maintainer) AS maintainers
FROM asked
WHERE answer IS NOT NULL
GROUP BY answer
ORDER BY packages DESC, answer;
