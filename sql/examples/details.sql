-- What each row took: tokens, cost, where the answer came from, and why a row has none.
SELECT package, d['value'] AS answer, d['error']['code'] AS error, d['usage']['prompt_tokens'] AS prompt_tokens,
       d['usage']['cached_tokens'] AS cached_tokens, d['cost'] AS cost, d['source'] AS source
FROM (
    SELECT package, complete_details('demo-llama-swiftkv', 'Name the section: ' || description) AS d
    FROM (FROM 'sql/examples/packages.parquet' ORDER BY package LIMIT 10)
);
