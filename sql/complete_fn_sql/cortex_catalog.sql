-- Snowflake's legacy names, for a catalog attached as snowflake: in memory, or beside a read-only database.
CREATE SCHEMA snowflake.cortex;

-- Without options the answer is text; with options it is Snowflake's JSON object (choices, created, model, usage).
CREATE MACRO snowflake.cortex.complete
    (model, prompt) AS system.main.complete(model, prompt),
    (model, prompt, options) AS system.main.ai_complete(model, prompt, options, NULL, true);

CREATE MACRO snowflake.cortex.try_complete
    (model, prompt) AS system.main.try_complete(model, prompt),
    (model, prompt, options) AS system.main.try_ai_complete(model, prompt, options, NULL, true);

CREATE MACRO snowflake.cortex.count_tokens(model, text) AS system.main.count_tokens(model, text);
