-- Snowflake's own spelling, unchanged: named arguments, history with options, token counts.
SELECT package,
       AI_COMPLETE(model => 'demo-llama-swiftkv', prompt => CONCAT('Name the section: ', description)) AS section,
       SNOWFLAKE.CORTEX.COMPLETE(
           'demo-llama-swiftkv',
           [{'role': 'user', 'content': 'Write a one-line synopsis: ' || description}],
           {'temperature': 0, 'max_tokens': 40}
       ) AS synopsis_with_details,
       SNOWFLAKE.CORTEX.COUNT_TOKENS('demo-llama-swiftkv', description) AS tokens
FROM (FROM 'sql/examples/packages.parquet' ORDER BY package LIMIT 5);
