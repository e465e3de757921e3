-- One of the labels, in one token, with each label's probability: what the model is unsure of is for a person to see.
SELECT package, d['value'] AS answer, round(d['scores'][d['value']], 3) AS probability, d['usage']['completion_tokens'] AS tokens
FROM (
    SELECT package, complete_classify_details('demo-llama-swiftkv', description,
        ['libs', 'libdevel', 'doc', 'python', 'perl', 'javascript', 'java', 'utils', 'net'],
        {'template': 'Name the section: {text}'}
    ) AS d
    FROM (FROM 'sql/examples/packages.parquet' ORDER BY package LIMIT 20)
)
ORDER BY probability;
