-- prompt() keeps fields apart from the instruction: only {name} is replaced, whatever the fields contain.
SELECT package, complete('demo-llama-swiftkv', prompt('Write a one-line synopsis: {text}', {'text': description})) AS synopsis
FROM (FROM 'sql/examples/packages.parquet' ORDER BY package LIMIT 10);
