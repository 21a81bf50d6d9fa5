//! Statements over arrays, one array per column.

/// Expands to one of sqlx's checked macros, so the statement is checked at compile time like any other. A column's
/// name, SQL type and values stand in one line; the numbers of the parameters and the lists of names are generated.
///
/// After the macro's name come the scalar parameters, which the text refers to as `$1`, `$2`, …, and then the parts of
/// the statement: text, `unnest(rows) {…}` for a row source named `n`, and `insert(rows) {…}` for the column list and
/// the source of an INSERT. A column is written
/// - `"name" "type[]" = |row| value;`,
/// - `"name" "type[]" "expression over n" = |row| value;` if the inserted value is not `n.name` itself, or
/// - `"name" "expression over n";` if it has no array of its own.
macro_rules! query_columns {
    (@scalars $query:ident [$number:tt $($numbers:tt)*] [$($args:tt)*]
        [$scalar:expr, $($scalars:tt)*] $($parts:tt)*) => {
        query_columns!(@scalars $query [$($numbers)*] [$($args)* $scalar,] [$($scalars)*] $($parts)*)
    };
    (@scalars $query:ident $numbers:tt $args:tt [] $($parts:tt)*) => {
        query_columns!(@parts $query $numbers [""] $args $($parts)*)
    };
    (@parts $query:ident $numbers:tt [$($sql:tt)*] [$($args:tt)*]) => {
        sqlx::$query!($($sql)*, $($args)*)
    };
    (@parts $query:ident $numbers:tt $sql:tt $args:tt insert($rows:expr) $columns:tt $($parts:tt)*) => {
        query_columns!(@columns $query $numbers $sql $args insert($rows) [] [] $columns $($parts)*)
    };
    (@parts $query:ident $numbers:tt $sql:tt $args:tt unnest($rows:expr) $columns:tt $($parts:tt)*) => {
        query_columns!(@columns $query $numbers $sql $args unnest($rows) [] [] $columns $($parts)*)
    };
    (@parts $query:ident $numbers:tt [$($sql:tt)*] $args:tt $text:tt $($parts:tt)*) => {
        query_columns!(@parts $query $numbers [$($sql)* + $text] $args $($parts)*)
    };
    (@columns $query:ident [$number:tt $($numbers:tt)*] $sql:tt [$($args:tt)*] $shape:ident($rows:expr)
        [$($inserted:tt)*] [$($arrays:tt)*] {$name:tt $ty:tt = $value:expr; $($columns:tt)*} $($parts:tt)*) => {
        query_columns!(@columns $query [$($numbers)*] $sql
            [$($args)* &$rows.iter().map($value).collect::<Vec<_>>() as _,] $shape($rows)
            [$($inserted)* ($name ("n." + $name))] [$($arrays)* ($name $number $ty)] {$($columns)*} $($parts)*)
    };
    (@columns $query:ident [$number:tt $($numbers:tt)*] $sql:tt [$($args:tt)*] $shape:ident($rows:expr)
        [$($inserted:tt)*] [$($arrays:tt)*]
        {$name:tt $ty:tt $expression:tt = $value:expr; $($columns:tt)*} $($parts:tt)*) => {
        query_columns!(@columns $query [$($numbers)*] $sql
            [$($args)* &$rows.iter().map($value).collect::<Vec<_>>() as _,] $shape($rows)
            [$($inserted)* ($name ($expression))] [$($arrays)* ($name $number $ty)] {$($columns)*} $($parts)*)
    };
    (@columns $query:ident $numbers:tt $sql:tt $args:tt $shape:ident($rows:expr)
        [$($inserted:tt)*] $arrays:tt {$name:tt $expression:tt; $($columns:tt)*} $($parts:tt)*) => {
        query_columns!(@columns $query $numbers $sql $args $shape($rows)
            [$($inserted)* ($name ($expression))] $arrays {$($columns)*} $($parts)*)
    };
    (@columns $query:ident $numbers:tt [$($sql:tt)*] $args:tt insert($rows:expr)
        [($name:tt ($($expression:tt)*)) $(($names:tt ($($expressions:tt)*)))*] $arrays:tt {} $($parts:tt)*) => {
        query_columns!(@columns $query $numbers
            [$($sql)* + " (" + $name $(+ ", " + $names)* + ") SELECT " + $($expression)* $(+ ", " + $($expressions)*)*
                + " FROM "]
            $args unnest($rows) [] $arrays {} $($parts)*)
    };
    (@columns $query:ident $numbers:tt [$($sql:tt)*] $args:tt unnest($rows:expr)
        $inserted:tt [($name:tt $number:tt $ty:tt) $(($names:tt $more:tt $types:tt))*] {} $($parts:tt)*) => {
        query_columns!(@parts $query $numbers
            [$($sql)* + "unnest(" + $number + "::" + $ty $(+ ", " + $more + "::" + $types)* + ") AS n ("
                + $name $(+ ", " + $names)* + ")"]
            $args $($parts)*)
    };
    ($query:ident, [$($scalars:expr),* $(,)?], $($parts:tt)*) => {
        query_columns!(@scalars $query
            ["$1" "$2" "$3" "$4" "$5" "$6" "$7" "$8" "$9" "$10" "$11" "$12" "$13" "$14" "$15" "$16" "$17" "$18"
             "$19" "$20" "$21" "$22" "$23" "$24" "$25" "$26" "$27" "$28" "$29" "$30" "$31" "$32" "$33" "$34" "$35"
             "$36" "$37" "$38" "$39" "$40" "$41" "$42" "$43" "$44" "$45" "$46" "$47" "$48" "$49" "$50" "$51" "$52" "$53" "$54"
             "$55" "$56" "$57" "$58" "$59" "$60"]
            [] [$($scalars,)*] $($parts)*)
    };
}

pub(super) use query_columns;
