-- Answers that are JSON by construction, taken apart in the same query.
SELECT package, answer ->> 'section' AS section, answer ->> 'synopsis' AS synopsis
FROM (
    SELECT package, complete('demo-llama-swiftkv', 'Describe as JSON: ' || description, {
        'max_tokens': 200,
        'response_format': {
            'type': 'object',
            'properties': {'section': {'type': 'string'}, 'synopsis': {'type': 'string'}},
            'required': ['section', 'synopsis']
        }
    }) AS answer
    FROM (FROM 'sql/examples/packages.parquet' ORDER BY package LIMIT 5)
);
