-- AI_COMPLETE with named arguments in any order. A function written in Python takes arguments by position only, so
-- these temporary macros stand in front of it; in a cursor, which has none of them, write AI_COMPLETE by position.
-- The forms with `return_error_details` give a STRUCT. DuckDB tells forms apart by the types of their parameters: no
-- argument of AI_COMPLETE is an INTEGER[][], so what comes after one is reached by name only. The last form, all six
-- by position, has other names so that it never matches a call by name.
CREATE OR REPLACE TEMP MACRO ai_complete
    (model, prompt, model_parameters := NULL, response_format := NULL, show_details := false)
        AS system.main.ai_complete(model, prompt, model_parameters, response_format, show_details),
    (model, prompt, return_error_details BOOLEAN,
     no_4th INTEGER[][] := NULL, no_5th INTEGER[][] := NULL, response_format := NULL, show_details := false)
        AS system.main.ai_complete_with_error(
            model, prompt, NULL, response_format, show_details, return_error_details),
    (model, prompt, model_parameters, return_error_details BOOLEAN,
     no_5th INTEGER[][] := NULL, response_format := NULL, show_details := false)
        AS system.main.ai_complete_with_error(
            model, prompt, model_parameters, response_format, show_details, return_error_details),
    (a, b, c, d, e BOOLEAN, f BOOLEAN)
        AS system.main.ai_complete_with_error(a, b, c, d, e, f);

-- Task functions that Snowflake's queries call with named arguments.
CREATE OR REPLACE TEMP MACRO ai_classify
    (input, categories) AS system.main.ai_classify(input, categories),
    (input, categories, config) AS system.main.ai_classify(input, categories, config);
CREATE OR REPLACE TEMP MACRO ai_translate(text, source_language, target_language) AS
    system.main.ai_translate(text, source_language, target_language);
CREATE OR REPLACE TEMP MACRO ai_extract(text, responseFormat) AS system.main.ai_extract(text, responseFormat);
