-- Sections of packages, in Snowflake; what failed, and why.
SELECT package, complete('demo-llama-swiftkv', 'Name the section: ' || description) AS section FROM packages WHERE size > 1000;

SELECT package, d:value::VARCHAR AS section, d:error:code::VARCHAR AS error, d:usage:prompt_tokens::NUMBER AS tokens
FROM (SELECT package, complete_details('demo-llama-swiftkv', 'Name the section: ' || description) AS d FROM packages) AS t;
