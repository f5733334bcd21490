from planner.checks.source.files import check_source as check_source
