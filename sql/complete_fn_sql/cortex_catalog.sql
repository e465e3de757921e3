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

-- The older task functions; the registration's task_model answers them.
CREATE MACRO snowflake.cortex.classify_text
    (input, categories) AS system.main.cortex_classify_text(input, categories),
    (input, categories, config) AS system.main.cortex_classify_text(input, categories, config);
CREATE MACRO snowflake.cortex.sentiment(text) AS system.main.cortex_sentiment(text);
CREATE MACRO snowflake.cortex.summarize(text) AS system.main.cortex_summarize(text);
CREATE MACRO snowflake.cortex.translate(text, source_language, target_language) AS
    system.main.ai_translate(text, source_language, target_language);
